"""Which head is meant, and what is refused before anything of Ray is loaded."""

from __future__ import annotations

import pytest

from launch.ray_jobs.head import DEFAULT_ADDRESS, ClusterError, connect, head_address


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, DEFAULT_ADDRESS),
        ("http://head:8265/", {}, "http://head:8265"),
        ("head:8265", {}, "http://head:8265"),
        ("https://ray.example.org", {}, "https://ray.example.org"),
        ("http://[::1]:8265", {}, "http://[::1]:8265"),
        (None, {"RAY_ADDRESS": "http://a:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "ray://a:10001"}, DEFAULT_ADDRESS),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, DEFAULT_ADDRESS),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://b:2"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "auto"}, "http://a:1"),
        ("http://c:3", {"RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://c:3"),
    ],
)
def test_the_address_is_what_was_given_else_what_the_environment_names_by_http(
    given: str | None, environment: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert head_address(given) == address


@pytest.mark.parametrize("given", ["ray://head:10001", "auto", "local", "http://head:port", "http://"])
def test_an_address_that_takes_no_jobs_is_refused(given: str) -> None:
    with pytest.raises(ClusterError, match="write http://HOST:8265"):
        head_address(given)


@pytest.mark.parametrize(
    "given",
    [
        "http://me:hunter2@head:8265",
        "me:hunter2@head:8265",
        "ray://me:hunter2@head:10001",
        "http://hunter2@head",
        "http://me:hunter2@head:port",
        "http://me:hunter2@",
        "http://head:8265/?token=hunter2",
        "http://head:8265?token=hunter2",
        "http://head:8265/#hunter2",
        "ray://head:10001?token=hunter2",
    ],
)
@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_password_in_an_address_is_refused_without_repeating_it(
    given: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        given = given if given.startswith("http") else f"http://{given.rpartition('/')[2]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", given)
    with pytest.raises(ClusterError) as refused:
        head_address(given if by == "option" else None)
    assert "hunter2" not in str(refused.value)
    assert "RAY_AUTH_TOKEN_PATH" in str(refused.value)


def test_nobody_there_is_said_at_once() -> None:
    with pytest.raises(ClusterError, match=r"nobody answers at http://127\.0\.0\.1:1 .*: start a head"):
        connect("http://127.0.0.1:1", allow_unauthenticated=False)
