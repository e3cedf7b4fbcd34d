"""Names in a config become factories: a built-in name, or ``package.module:attribute`` for something of the user's."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Factory = TypeVar("Factory")


def resolve(name: str, known: Mapping[str, Factory], *, kind: str) -> Factory:
    """``known[name]``, or what ``package.module:attribute`` names (dots may follow the colon, as in ``Class.method``).

    ``kind`` says in errors what was looked for: "policy", "optimizer". Raises ``ValueError`` for a name that is
    neither, for a module that cannot be imported, and for an attribute that is missing or cannot be called.
    """
    if name in known:
        return known[name]
    module_name, colon, path = name.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module_name.split("."), *path.split(".")))):
        raise ValueError(
            f"unknown {kind} {name!r}{_nearest(name, known)}; known: {', '.join(known)}; "
            "or write package.module:attribute for one of your own"
        )
    try:
        found: object = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{kind} {name!r}: cannot import {module_name} ({error}); check its spelling, and that it is installed or "
            "lies in a folder of the Python path on every machine"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"{kind} {name!r}: {module_name} was imported and has no {path}{_nearest(part, dir(found))}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"{kind} {name!r}: {path} is of type {type(found).__name__} and cannot be called; name a factory"
        )
    return found  # type: ignore[return-value]  # what a user names is trusted to fit; its result is checked by use


def _nearest(word: str, known: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""
