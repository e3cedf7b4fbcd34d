"""Whoever reads a published formula in the code finds its paper in the docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from orchestrator.core import (
    advising,
    curvature,
    expected_smoothness,
    goodput,
    intervals,
    lr_rules,
    noise,
    policies,
    preferences,
    schedules,
)
from orchestrator.measure import curvature as measured_curvature
from orchestrator.optim import OPTIMIZERS

PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}\b|doi:10\.\d{4,9}/\S+")

# A registered name and what carries its formula, where that is not the module's attribute of the same name.
SAME = {
    ("lr_rules", "adascale"): lr_rules.noise_scale,
    ("preferences", "noise_scale"): preferences.proportional,
    ("preferences", "goodput"): goodput,
    ("preferences", "expected_smoothness"): expected_smoothness.ExpectedSmoothness,
}

# What is nobody's: bookkeeping, textbook numerics with their own reference, shapes older than any paper, and what was
# derived here.
NOBODYS = {
    "lr_rules": {"constant", "build_rule"},
    "schedules": {"constant", "linear", "step", "build_schedule"},
    "noise": {"init", "absorb"},
    "intervals": {"t_quantile"},
    "preferences": {"always", "exploring", "untimed"},
    "curvature": {"plan_curvature"},
    "advising": {"follow_plan"},
}


def registered() -> Iterator[tuple[str, str, Any]]:
    for module, registry in ((lr_rules, lr_rules.LR_RULES), (schedules, schedules.SCHEDULES)):
        for name in registry:
            room = module.__name__.rpartition(".")[2]
            yield room, name, SAME.get((room, name), getattr(module, name, None))
    for name in policies.PREFERENCES:
        yield "preferences", name, SAME.get(("preferences", name), getattr(preferences, name, None))
    for name, optimizer in OPTIMIZERS.items():
        yield "optim", name, optimizer


def public_functions(module: ModuleType) -> Iterator[tuple[str, str, Any]]:
    room = module.__name__.rpartition(".")[2]
    for name, value in vars(module).items():
        inner = inspect.unwrap(value) if callable(value) else value
        if inspect.isfunction(inner) and inner.__module__ == module.__name__ and not name.startswith("_"):
            yield room, name, value


FORMULAS = [
    *registered(),
    *(found for module in (noise, intervals, preferences, lr_rules, schedules, advising, curvature, measured_curvature)
      for found in public_functions(module)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("room", "name", "formula"),
    [
        pytest.param(room, name, formula, id=f"{room}-{name}")
        for room, name, formula in FORMULAS
        if name not in NOBODYS.get(room, ())
    ],
)
def test_every_formula_names_its_paper(room: str, name: str, formula: Any) -> None:
    assert formula is not None, f"{room} registers {name}, and has nothing of that name that a reader would find"
    assert PAPER.search(inspect.getdoc(formula) or ""), f"{room}.{name}: name the paper (arXiv:... or doi:...)"


def test_what_is_said_to_be_nobodys_is_there_and_names_nobody() -> None:
    listed = {(room, name): formula for room, name, formula in FORMULAS}
    for room, names in NOBODYS.items():
        for name in names:
            assert not PAPER.search(inspect.getdoc(listed[room, name]) or ""), f"{room}.{name} has a paper after all"
