"""How is the head of a Ray cluster found, and may this project talk to it?

Ray's own client (``JobSubmissionClient``) waits without end for a head that does not answer, takes its address from the
environment even where one was named, and leaves a missing token to a traceback; that is settled before it is made.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from launch.doctor import unreachable
from orchestrator.errors import GroundswellError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_PATIENCE_S = 10.0
_HOW_TO_AUTHENTICATE = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (ray get-auth-token prints it "
    "on the head); a token never belongs in a config or a command line"
)


class ClusterError(GroundswellError):
    """A cluster, or a job on it, that cannot be reached or must not be used as asked."""


def head_address(given: str | None) -> str:
    """Where the head answers: as given, else as the environment names it, else on this machine.

    Raises ``ClusterError`` for an address that is not HTTP.
    """
    if given is None:
        named = (os.environ.get(variable, "") for variable in _ADDRESS_VARIABLES)
        given = next((address for address in named if address.startswith(("http://", "https://"))), DEFAULT_ADDRESS)
    if "@" in given:  # before anything that repeats the address
        raise ClusterError(
            f"--address holds a password, which others can read in the process list: {_HOW_TO_AUTHENTICATE}"
        )
    address = given if "://" in given else f"http://{given}"
    if "?" in address or "#" in address:
        raise ClusterError(
            f"--address holds more than http://HOST:8265, behind a ? or #; where that is a token, "
            f"{_HOW_TO_AUTHENTICATE}"
        )
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or "." in parts.hostname)
    except ValueError:  # a port that is none
        whole = False
    if not whole:
        raise ClusterError(f"--address {given} is not where a head takes jobs: write http://HOST:8265")
    return address.rstrip("/")


def connect(address: str, *, allow_unauthenticated: bool) -> JobSubmissionClient:
    """Ray's client of the head at ``address``.

    Raises ``ClusterError`` where nobody answers, where the token is missing or wrong, and where a head beyond this
    machine takes jobs, which run any code, from whoever reaches it; unless ``allow_unauthenticated``.
    """
    silence = unreachable(address)
    if silence is not None:
        raise ClusterError(f"{silence}: start a head with ray start --head, or name one with --address")
    asks = _asks_for_a_token(address)
    if not asks and not allow_unauthenticated and not _is_this_machine(address):
        raise ClusterError(
            f"the head at {address} asks for no token, so that everybody who reaches it can run code on the cluster: "
            "start it with RAY_AUTH_MODE=token, or pass --allow-unauthenticated where its network is closed to others"
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else Ray would prefer what the environment named before
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "")
        seen = "refused the token that it was given" if mode == "token" else "asks for a token, and none was sent"
        raise ClusterError(f"the head at {address} {seen}: {_HOW_TO_AUTHENTICATE}") from error
    except Exception as error:  # such as RAY_AUTH_MODE=token without a token, which is found in Ray's C++ code
        raise ClusterError(
            f"Ray's client cannot use {address}: {_first_line(error)}; {_HOW_TO_AUTHENTICATE}"
        ) from error


@contextmanager
def answering(client: JobSubmissionClient) -> Iterator[None]:
    """Turn a connection that breaks, and an answer that is a refusal, into ``ClusterError``."""
    try:
        yield
    except OSError as error:  # as are all errors of requests
        raise ClusterError(f"the head at {client.get_address()} answers no longer ({_first_line(error)})") from error
    except RuntimeError as error:  # Ray's word for every answer but 200
        raise ClusterError(f"the head at {client.get_address()} does not do as asked: {_first_line(error)}") from error


def check_versions(client: JobSubmissionClient, *, ray_version: str) -> str | None:
    """Refuse a head of another Ray than ``ray_version`` with ``ClusterError``; what else is worth saying, or nothing.

    Pythons may differ: a job is text and files, and is pickled only between the head and its workers.
    """
    seen = _get(client.get_address(), "/api/version", client)["ray_version"]
    if seen.split(".")[:2] != ray_version.split(".")[:2]:
        raise ClusterError(
            f"the head at {client.get_address()} runs Ray {seen}, and this is Ray {ray_version}: Groundswell uses what "
            f"changes between minor versions; install ray=={seen} here, or put the same Groundswell and Ray into the "
            "cluster's image"
        )
    try:
        python = str(_get(client.get_address(), "/api/v0/cluster_metadata", client)["data"]["pythonVersion"])
    except (ClusterError, KeyError, TypeError):
        return None  # Ray promises nothing about this one
    here = ".".join(str(part) for part in sys.version_info[:3])
    if python.split(".")[:2] == here.split(".")[:2]:
        return None
    return f"the head has Python {python} and this machine {here}; the run uses the head's"


def _asks_for_a_token(address: str) -> bool:
    import requests

    try:
        # No credentials of a .netrc either: the question is what a stranger is told.
        answer = requests.get(f"{address}/api/version", timeout=_PATIENCE_S, auth=lambda request: request)
    except requests.RequestException as error:
        raise ClusterError(f"{address} does not answer as a Ray head does ({_first_line(error)})") from error
    if answer.status_code in (401, 403):
        return True
    if answer.status_code != 200 or "ray_version" not in answer.text:
        raise ClusterError(
            f"{address} is not a Ray head with a job server (GET /api/version gave {answer.status_code}): name the "
            "dashboard's address, and see that the head has ray[default]"
        )
    return False


def _get(address: str, path: str, client: JobSubmissionClient) -> Any:
    answer = client._do_request("GET", path, timeout=_PATIENCE_S)
    if answer.status_code != 200:
        raise ClusterError(f"GET {address}{path} gave {answer.status_code}")
    return answer.json()


def _is_this_machine(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
