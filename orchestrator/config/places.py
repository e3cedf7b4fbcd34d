"""Where may a run be kept: in a folder, or at a URL that fsspec can write to?"""

from __future__ import annotations

import re

from orchestrator.config.section import Broken, refuse
from orchestrator.config.suggestions import nearest

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_PLAIN = re.compile(r"[^:]+://[^\s?#@:]*")

# What fsspec knows besides, and a run cannot be kept at: it is read only, or gone with a process.
_USELESS = {
    "memory": "keeps files in the memory of one process",
    "http": "is only read from",
    "https": "is only read from",
    "data": "is only read from",
}


def is_url(place: str) -> bool:
    """Whether ``place`` is a URL, and not a path."""
    return _SCHEME.match(place) is not None


def place_of_runs(place: str) -> str:
    """``place``, if runs can be kept there: any path, or a plain URL without a user, options or a chain."""
    scheme = _SCHEME.match(place)
    if scheme is None:
        return place
    # Here, and not above: it takes a tenth of a second, and most runs are kept in a folder.
    from fsspec.registry import known_implementations

    name, fix = scheme[1], "write s3://bucket/runs or gs://bucket/runs, or a folder that all nodes share"
    rule = None
    if name in _USELESS:
        rule = f"{name}:// {_USELESS[name]}, and a run could not be kept there"
    elif _PLAIN.fullmatch(place) is None:
        rule = "must be a plain URL: no user or password, no options, and no chain of file systems"
        name = name.rpartition(":")[2]
        fix = f"write {name}://bucket/runs; credentials come from the service account or the environment"
    elif name not in known_implementations:
        rule = f"{name}:// is no storage that fsspec knows"
        guess = nearest(name, known_implementations)
        fix = f"did you mean {guess}://?" if guess else fix
    elif not place[scheme.end() :].strip("/"):
        rule, fix = "names no place below it", f"write {name}://bucket/runs"
    refuse([] if rule is None else [Broken(keys=(), value=place, rule=rule, fix=fix)])
    return place
