"""What is relied on of Ray Train is there; whatever is missing or has changed is named, and resizes fall back."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.ray_train.policy import AdaptiveScalingPolicy
from orchestrator.ray_train.seam import RELIED_ON, Relied, changes
from orchestrator.ray_train.trainer import AdaptiveTrainer
from tests.support import config

NAMES = [pytest.param(relied, id=relied.name) for relied in RELIED_ON]
METHODS = [pytest.param(r, name, id=f"{r.name}.{name}") for r in RELIED_ON for name in r.methods if name != "__init__"]
SIGNATURES = [
    pytest.param(r, name, id=f"{r.name}.{name}")
    for r in RELIED_ON
    for name, parameters in [*r.methods.items(), *([] if r.parameters is None else [(None, r.parameters)])]
    if parameters is not None
]
FIELDS = [pytest.param(r, name, id=f"{r.name}.{name}") for r in RELIED_ON for name in r.fields]
USES = [
    pytest.param(r, method, name, id=f"{method}-{name}")
    for r in RELIED_ON
    for method, names in r.uses.items()
    for name in names
]


def found(relied: Relied) -> Any:
    return getattr(importlib.import_module(relied.module), relied.name)


def the_class(relied: Relied) -> Any:
    """Ray's actor classes are instances of a class of their own."""
    return of if isinstance(of := found(relied), type) else type(of)


def another_signature(first: int, second: int) -> None: ...


def test_the_ray_at_hand_has_all_that_is_relied_on() -> None:
    assert changes() == []


@pytest.mark.parametrize("relied", NAMES)
def test_a_name_that_is_gone_is_named(relied: Relied, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(importlib.import_module(relied.module), relied.name)
    assert f"{relied.module}.{relied.name} is gone" in changes([relied])


def test_a_module_that_is_gone_is_named() -> None:
    moved = replace(RELIED_ON[0], module="ray.train.v2.api.moved_elsewhere")
    assert changes([moved]) == ["ray.train.v2.api.moved_elsewhere.DataParallelTrainer is gone"]


@pytest.mark.parametrize(("relied", "method"), METHODS)
def test_a_method_that_is_gone_is_named(relied: Relied, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for base in the_class(relied).__mro__:
        if method in vars(base):
            if getattr(base, "__abstractmethods__", None):
                monkeypatch.setattr(base, "__abstractmethods__", frozenset())
            monkeypatch.delattr(base, method)
    assert f"{relied.name}.{method} is gone" in changes([relied])


@pytest.mark.parametrize(("relied", "method"), SIGNATURES)
def test_other_parameters_are_named(relied: Relied, method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if method is None:
        monkeypatch.setattr(importlib.import_module(relied.module), relied.name, another_signature)
    else:
        monkeypatch.setattr(the_class(relied), method, another_signature)
    name = relied.name if method is None else f"{relied.name}.{method}"
    assert any(change.startswith(f"{name} takes (") for change in changes([relied]))


def test_a_further_parameter_is_named_where_it_has_no_default() -> None:
    here = Relied(module=__name__, name="takes_more", parameters=("first",))
    assert changes([here]) == []
    stricter = replace(here, name="demands_more")
    assert changes([stricter]) == ["demands_more takes (first, second) and not (first)"]


def takes_more(first: int, second: int = 0, *rest: int, **named: int) -> None: ...


def demands_more(first: int, second: int) -> None: ...


@pytest.mark.parametrize(("relied", "name"), FIELDS)
def test_a_field_that_is_gone_is_named(relied: Relied, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = found(relied)
    if name in (fields := getattr(of, "__dataclass_fields__", {})):
        monkeypatch.setattr(of, "__dataclass_fields__", {key: one for key, one in fields.items() if key != name})
    for base in of.__mro__:
        for key, one in list(vars(base).items()):
            if isinstance(one, FunctionType) and name in one.__code__.co_names:
                monkeypatch.setattr(base, key, renamed(one, name))
    assert f"{relied.name} has no {name}" in changes([relied])


@pytest.mark.parametrize(("relied", "method", "name"), USES)
def test_a_method_that_goes_by_another_name_is_named(
    relied: Relied, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found(relied), method, renamed(getattr(found(relied), method), name))
    assert f"{relied.name}.{method} does not go by {name}" in changes([relied])


def renamed(function: FunctionType, name: str) -> FunctionType:
    """The same with another name in the place of ``name`` (its code is never run)."""
    names = tuple(f"{one}_renamed" if one == name else one for one in function.__code__.co_names)
    code = function.__code__.replace(co_names=names)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def test_where_ray_has_changed_a_resize_is_the_graceful_restart_and_the_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trainer(name: str, resize: str) -> AdaptiveTrainer:
        return AdaptiveTrainer(config(tmp_path, run={"name": name}, workers={"max": 2, "resize": resize}))

    assert notes_of(trainer("as-expected", "live")) == []
    monkeypatch.delattr(WorkerGroup, "_create_workers")
    changed = trainer("changed", "live")
    assert changed.train_loop_config["config"]["workers"]["resize"] == "restart"
    assert type(changed.backend_config) is TorchConfig
    (note,) = notes_of(changed)
    assert note["kind"] == "resize_falls_back"
    assert "WorkerGroup._create_workers is gone" in note["reason"]
    assert notes_of(trainer("asked-for", "restart")) == []


def notes_of(trainer: AdaptiveTrainer) -> list[Any]:
    """What the scaling policy that the trainer makes has for the run's events."""
    made: list[Any] = []

    def keep(self: Any, **kwargs: Any) -> None:
        made.append(kwargs["scaling_policy"])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DataParallelTrainer, "_initialize_and_run_controller", keep)
        trainer._initialize_and_run_controller()
    (policy,) = made
    assert isinstance(policy, AdaptiveScalingPolicy)
    return list(policy._notes)
