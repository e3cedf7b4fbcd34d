"""A name finds its factory, and a name that does not says what would have been right."""

import math
from pathlib import Path

import pytest

from orchestrator.registry import resolve

KNOWN = {"cosine": math.cos, "linear": abs}


def test_a_known_name_gives_its_factory() -> None:
    assert resolve("cosine", KNOWN, kind="schedule") is math.cos


@pytest.mark.parametrize(("name", "found"), [("math:sin", math.sin), ("pathlib:Path.cwd", Path.cwd)])
def test_an_import_path_gives_the_attribute(name, found) -> None:
    assert resolve(name, KNOWN, kind="schedule") == found


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'cosin'.*did you mean cosine.*cosine, linear"):
        resolve("cosin", KNOWN, kind="schedule")


def test_a_name_like_none_of_them_guesses_nothing() -> None:
    with pytest.raises(ValueError, match="known: cosine, linear") as caught:
        resolve("zzz", KNOWN, kind="schedule")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ":", "math:", ":sin", "a/b.py:f", "math:sin:cos", "math sin"])
def test_what_is_no_import_path_is_refused(name) -> None:
    with pytest.raises(ValueError, match="unknown schedule"):
        resolve(name, KNOWN, kind="schedule")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here:thing", "cannot import no_such_module_here"),
        ("math:sinn", "did you mean sin"),
        ("math:pi", "cannot be called"),
    ],
)
def test_an_import_that_fails_says_where(name, said) -> None:
    with pytest.raises(ValueError, match=said):
        resolve(name, KNOWN, kind="schedule")
