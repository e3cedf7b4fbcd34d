"""Names, options, data and models that do not fit the protocol are refused with the reason; what fits is taken."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from orchestrator.errors import TaskError
from orchestrator.tasks.protocol import Task, build_task, check_dataset, check_model, check_task, collate_of

BAD_OPTIONS = [
    ("digits", {"model": "resnet"}, "convnet, batchnorm"),
    ("digits", {"width": 12}, "multiple of 8"),
    ("digits", {"width": True}, "multiple of 8"),
    ("digits", {"augment": "yes"}, "true or false"),
    ("digits", {"label_noise": 1.5}, "between 0 and 1"),
    ("digits", {"witdh": 8}, "did you mean width"),
    ("char_lm", {"heads": 5}, "heads may be 1, 2, 3, 4, 6, 8"),
    ("char_lm", {"context": 0}, "at least 1"),
    ("char_lm", {"depth": 1.5}, "whole number"),
    ("char_lm", {"dropout": 1}, "below 1"),
    ("char_lm", {"held_out_fraction": 0}, "between 0 and 1"),
    ("char_lm", {"text": "no/such/file.txt"}, "there is no file no/such/file.txt"),
    ("char_lm", {"text": 3}, "path of a text file"),
    ("digit", {}, "did you mean digits"),
    ("my_task.py", {}, "package.module:attribute"),
    ("no_such_module:x", {}, "No module named.*folder of the Python path"),
    ("math:no_such", {}, "has no no_such"),
    ("math:pi", {}, "cannot be called"),
    ("fractions:Fraction", {}, "no method model"),
    ("operator:truediv", {}, "missing a required argument: 'a'"),
    ("builtins:int", {}, "no method model"),
]


@pytest.mark.parametrize(("name", "options", "told"), BAD_OPTIONS, ids=[f"{n} {o}" for n, o, _ in BAD_OPTIONS])
def test_a_wrong_name_or_option_is_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(TaskError, match=told):
        build_task(name, options)


class Stub:
    """A task that fits, until a test breaks it."""

    def __init__(self, **changed: Any) -> None:
        self.train_set: Any = [1, 2, 3]
        self.eval_set: Any = [4]
        vars(self).update(changed)

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).mean()

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {}


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Lengthless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


RayDataset = type("Dataset", (), {"__module__": "ray.data.dataset", "__len__": lambda self: 3})

BAD_DATASETS = {
    "iterable": (Endless(), "iterable data set.*map-style"),
    "generator": ((i for i in range(3)), "iterable data set.*map-style"),
    "DataLoader": (DataLoader([1, 2]), r"DataLoader.*loader\.dataset.*data\.loader_workers"),
    "sampler": (RandomSampler([1, 2]), "sampler.*Subset"),
    "Ray Data": (RayDataset(), "Ray Data.*map-style"),
    "no length": (Lengthless(), "no length"),
    "empty": ([], "empty"),
    "mapping": ({"train": [1]}, "choose one"),
    "nothing": (None, "None"),
    "class": (list, "class 'list'"),
    "number": (3, "not a data set"),
}


@pytest.mark.parametrize(("dataset", "told"), BAD_DATASETS.values(), ids=BAD_DATASETS)
@pytest.mark.parametrize("name", ["train_set", "eval_set"])
def test_data_that_do_not_fit_are_refused_with_the_reason(name: str, dataset: Any, told: str) -> None:
    with pytest.raises(TaskError, match=told) as caught:
        check_task(Stub(**{name: dataset}))
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "dataset", [[1], torch.zeros(3, 2), Lengthless.__new__(type("D", (Lengthless,), {"__len__": lambda s: 1}))]
)
def test_anything_with_length_and_index_is_a_data_set(dataset: Any) -> None:
    check_dataset(dataset)


BAD_MODELS = {
    "nothing": (None, "returned NoneType"),
    "two": ([nn.Linear(1, 1), nn.Linear(1, 1)], "several networks"),
    "no parameters": (nn.ReLU(), "no parameters"),
    "frozen": (nn.Linear(1, 1).requires_grad_(False), "requires_grad=False"),
}


@pytest.mark.parametrize(("model", "told"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_model_without_anything_to_train_is_refused(model: Any, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        check_task(Stub(), model)


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(TaskError, match="lazy"):
        check_model(nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"optimizers": [1, 2]}, "GAN"),
        ({"configure_optimizers": lambda: None}, "GAN"),
        ({"collate": "stack"}, "collate must be callable"),
        ({"loss": None}, r"no method loss\(\)"),
    ],
)
def test_other_parts_that_do_not_fit_are_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(TaskError, match=told):
        check_task(Stub(**changed))


def test_a_task_without_its_data_is_refused() -> None:
    task = Stub()
    del task.eval_set
    with pytest.raises(TaskError, match="no eval_set"):
        check_task(task)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("made_for_this_test")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_the_seed_goes_to_factories_that_ask_for_it(module: types.ModuleType) -> None:
    module.asks = lambda *, depth=1, seed: Stub(told=(depth, seed))
    module.does_not = lambda depth=1: Stub(told=depth)
    module.takes_all = lambda **options: Stub(told=options)
    assert build_task("made_for_this_test:asks", {"depth": 2}, seed=7).told == (2, 7)
    assert build_task("made_for_this_test:does_not", seed=7).told == 1
    assert build_task("made_for_this_test:takes_all", {"a": 1}, seed=7).told == {"a": 1}


def test_a_factory_says_which_options_it_knows(module: types.ModuleType) -> None:
    module.factory = lambda path, seed, depth=1: Stub()
    with pytest.raises(TaskError, match=r"no option 'dept'; did you mean depth\? \(its options: path, depth\)"):
        build_task("made_for_this_test:factory", {"dept": 2})
    with pytest.raises(TaskError, match="missing a required argument: 'path'"):
        build_task("made_for_this_test:factory")


def test_a_failing_factory_or_import_is_told_with_its_cause(
    module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def factory() -> Task:
        raise FileNotFoundError("data.csv")

    module.factory = factory
    with pytest.raises(TaskError, match=r"factory raised FileNotFoundError: data\.csv") as caught:
        build_task("made_for_this_test:factory")
    assert isinstance(caught.value.__cause__, FileNotFoundError)

    (tmp_path / "imports_what_is_missing.py").write_text("import no_such_library\n")
    (tmp_path / "fails_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TaskError, match="No module named 'no_such_library'"):
        build_task("imports_what_is_missing:task")
    with pytest.raises(TaskError, match="raised ZeroDivisionError"):
        build_task("fails_at_import:task")


def test_a_tasks_own_collate_is_used() -> None:
    assert collate_of(Stub(collate=sum))([1, 2]) == 3
    assert torch.equal(collate_of(Stub())([1, 2]), torch.tensor([1, 2]))
