"""What was probably meant: the nearest right name or key, or the number behind a unit?"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# What people coming from other tools write.
_SYNONYMS = {
    "amp": "train.precision",
    "batch_size": "batch.initial",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "clip_grad_norm": "train.max_grad_norm",
    "dataset": "task",
    "global_batch_size": "batch.initial",
    "grad_clip": "train.max_grad_norm",
    "gradient_accumulation_steps": "batch.micro_batch",
    "learning_rate": "optimizer.lr",
    "max_epochs": "train.epochs",
    "max_steps": "train.samples",
    "model": "task",
    "num_epochs": "train.epochs",
    "num_workers": "workers.initial",
    "scheduler": "schedule",
    "steps": "train.samples",
    "warmup": "schedule.warmup_samples",
    "warmup_steps": "schedule.warmup_samples",
    "wd": "optimizer.weight_decay",
    "world_size": "workers.initial",
}
_MAGNITUDES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0, "m": 60.0, "min": 60.0, "minutes": 60.0, "h": 3600.0}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` was probably meant to be."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def import_hint(name: str) -> str | None:
    """How a name is written that reads like a file or a dotted path, if it does."""
    path, colon, attribute = name.partition(":")
    if path.endswith(".py") or "/" in path:
        module = path.removesuffix(".py").strip("./").replace("/", ".")
        return f"name the module as an import does: {module}:{attribute or 'attribute'}"
    if not colon and "." in path:
        module, _, attribute = path.rpartition(".")
        return f"separate module and attribute by a colon: {module}:{attribute}"
    return None


def likely_key(word: str, siblings: Collection[str], inside: str, sections: Mapping[str, Iterable[str]]) -> str | None:
    """The key meant by ``word`` in section ``inside`` with the keys ``siblings``, or in another of ``sections``."""
    prefix = f"{inside}." if inside else ""
    by_leaf: dict[str, list[str]] = {}
    for name, keys in sections.items():
        for key in keys:
            by_leaf.setdefault(key, []).append(f"{name}.{key}")
    for known in (word, f"{word}_samples", f"{word}_s"):
        if known in siblings:
            return prefix + known
    if word in by_leaf:
        return " or ".join(by_leaf[word])
    if word in _SYNONYMS:
        return _SYNONYMS[word]
    if sibling := nearest(word, siblings):
        return prefix + sibling
    leaf = nearest(word, by_leaf)
    return " or ".join(by_leaf[leaf]) if leaf else None


def number_hint(value: Any, *, unit: str, whole: bool, loc: tuple[str | int, ...]) -> str | None:
    """The number meant by ``value``, which is not one: a unit, a separator or a fraction too much."""
    if isinstance(value, bool):
        return "true and false are not numbers"
    if isinstance(value, float):
        return f"write {int(value)}" if math.isfinite(value) and value.is_integer() else "write it without a fraction"
    if not isinstance(value, str):
        return None
    found = re.fullmatch(r"\s*([-+]?[0-9][0-9_, ]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*(%|[A-Za-z-]*)\s*", value)
    if found is None:
        return "write digits only"
    if re.fullmatch(r"[-+]?[0-9]+,([0-9]{1,2}|[0-9]{4,})", found[1]):
        return f"the decimal sign is a point: write {found[1].replace(',', '.')}"
    number, suffix = float(re.sub(r"[_, ]", "", found[1])), found[2].lower()
    if loc[:2] == ("train", "samples") and suffix.startswith("epoch"):
        return f"write train.epochs: {number:.15g} instead"
    if suffix.startswith("step") and unit == "samples":
        return "this counts samples, not steps: multiply the steps by the batch"
    if suffix == "%":
        number /= 100
    elif unit == "s":
        number *= _SECONDS.get(suffix, 1.0)
    else:
        number *= _MAGNITUDES.get(suffix, 1.0)
    if whole and not number.is_integer():
        return f"write a whole number near {number:.15g}"
    return f"write {number:.15g}, without quotes, unit or separators"


def bound_hint(value: Any, bound: str, ctx: dict[str, Any]) -> str | None:
    """The fraction meant by a percentage."""
    if bound in ("le", "lt") and ctx[bound] == 1 and isinstance(value, (int, float)) and 1 < value <= 100:
        return f"it is a fraction: for {value:g} % write {value / 100:g}"
    return None
