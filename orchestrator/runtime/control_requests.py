"""A request to a running job, as a file in the run's folder: written whole, read once, understood or refused.

Whoever operates a run writes ``control/<time>-<random>.json`` under a temporary name and renames it; who takes it
renames it again, so that exactly one of both has it. Nothing heavy is imported here, for a command line writes them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from orchestrator.errors import StorageError
from orchestrator.types import Orders

CONTROL = "control"
SUFFIX = ".json"
TAKEN = ".taken"
_MOST_BYTES = 64 * 1024
Order = Literal["hold", "release", "cap", "checkpoint", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """``caps`` holds those of ``max_batch`` and ``max_workers`` that a ``cap`` changes; ``None`` lifts one.

    ``expires_s`` is the Unix time from which nobody waits for the answer; ``None``: never.
    """

    id: str
    order: Order
    caps: Mapping[str, int | None]
    expires_s: float | None = None

    def onto(self, standing: Orders) -> Orders:
        """The orders that stand after it."""
        if self.order != "cap":
            return replace(standing, held=self.order == "hold")
        most_samples, most_workers = standing.max_batch, standing.max_workers
        return replace(
            standing,
            max_batch=self.caps.get("max_batch", most_samples),
            max_workers=self.caps.get("max_workers", most_workers),
        )


def write_request(run: Path, order: Order, *, caps: Mapping[str, int | None], timeout_s: float) -> str:
    """Put a request into the folder of a run, whole or not at all; its id. Raises ``StorageError``."""
    request = f"{time.time_ns()}-{secrets.token_hex(4)}"
    path = run / CONTROL / f"{request}{SUFFIX}"
    unfinished = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        unfinished.write_text(
            json.dumps({"order": order, "expires_s": time.time() + timeout_s, **caps}), encoding="utf-8"
        )
        unfinished.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}; orders are given where the run's folder can be written"
        ) from error
    return request


def withdraw_request(run: Path, request: str) -> bool:
    """Whether it was there still; else the job has taken it."""
    try:
        (run / CONTROL / f"{request}{SUFFIX}").unlink()
    except FileNotFoundError:
        return False
    return True


def take_request(path: Path) -> bool:
    """Whether it was there still; else it was withdrawn."""
    try:
        path.rename(path.with_suffix(TAKEN))
    except FileNotFoundError:
        return False
    except OSError:  # storage that does not rename now; the order is obeyed all the same
        return True
    return True


def read_request(path: Path) -> Request:
    """Raises ``OSError``, and ``ValueError`` for what is no request; what is far too long for one is not read."""
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        data = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError("a request is a JSON object")
    order = data.pop("order", None)
    if order not in get_args(Order):
        raise ValueError(f"order is {order!r}, and must be one of {', '.join(get_args(Order))}")
    expires_s = data.pop("expires_s", None)
    if expires_s is not None and type(expires_s) not in (int, float):
        raise ValueError(f"expires_s is {expires_s!r}, and must be a Unix time, or null")
    known = ("max_batch", "max_workers") if order == "cap" else ()
    for key, value in data.items():
        if key not in known:
            raise ValueError(f"{order} does not take {key}")
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{key} is {value!r}, and must be a whole number from 1 on, or null to lift the cap")
    if order == "cap" and not data:
        raise ValueError("a cap needs max_batch, max_workers or both")
    return Request(id=path.stem, order=order, caps=data, expires_s=expires_s)
