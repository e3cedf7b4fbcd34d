"""Tasks fit the protocol, their data are split for good, and what does not fit is refused with the reason."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from orchestrator.errors import TaskError
from orchestrator.runtime.loader import PositionLoader
from orchestrator.tasks.protocol import Task, build_task, check_dataset, check_model, check_task, collate_of

SMALL_LM = {"context": 16, "width": 16, "depth": 1, "heads": 2}
TASKS = [
    ("digits", {"width": 8}),
    ("digits", {"width": 8, "model": "batchnorm"}),
    ("digits", {"width": 8, "augment": False, "label_noise": 0.5}),
    ("char_lm", SMALL_LM),
    ("char_lm", {**SMALL_LM, "dropout": 0.2}),
]


def batch_of(dataset: Any, count: int) -> Any:
    return default_collate([dataset[i] for i in range(count)])


@pytest.fixture(params=TASKS, ids=str)
def task(request: pytest.FixtureRequest) -> Task:
    return build_task(*request.param)


# The contract every built-in task keeps


def test_a_task_fits_the_protocol_with_its_model(task: Task) -> None:
    check_task(task, task.model())


def test_the_model_follows_from_the_seed(task: Task) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(task.model().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_loss_is_a_mean_over_samples(task: Task) -> None:
    model = task.model().eval()  # BatchNorm and dropout couple or disturb samples while training
    torch.manual_seed(0)
    samples = [task.train_set[i] for i in range(12)]
    whole = task.loss(model, default_collate(samples))
    parts = task.loss(model, default_collate(samples[:4])) * 4 + task.loss(model, default_collate(samples[4:])) * 8
    assert whole.dim() == 0
    assert whole.requires_grad
    assert float(whole.detach()) == pytest.approx(float(parts.detach()) / 12, rel=1e-5)


def test_metrics_are_means_over_samples(task: Task) -> None:
    model = task.model().eval()
    with torch.no_grad():
        whole = task.metrics(model, batch_of(task.eval_set, 12))
        alone = [task.metrics(model, default_collate([task.eval_set[i]])) for i in range(12)]
    for name, value in whole.items():
        assert float(value) == pytest.approx(sum(float(m[name]) for m in alone) / 12, rel=1e-4), name


def test_every_parameter_takes_part(task: Task) -> None:
    model = task.model()
    task.loss(model, batch_of(task.train_set, 4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_untrained_model_knows_nothing(task: Task) -> None:
    torch.manual_seed(0)
    scores = len(task.vocabulary) if hasattr(task, "vocabulary") else 10
    loss = float(task.loss(task.model(), batch_of(task.train_set, 64)).detach())
    assert loss == pytest.approx(math.log(scores), rel=0.25)


# digits


def test_digits_holds_out_360_scans_that_are_not_trained_on() -> None:
    task = build_task("digits", {"augment": False})
    train, held_out = task.train_set.images.flatten(1), task.eval_set.images.flatten(1)
    assert (len(train), len(held_out)) == (1437, 360)
    assert torch.cdist(held_out, train).min() > 0
    assert torch.equal(train, build_task("digits", seed=9).train_set.images.flatten(1)), "the split is fixed"
    assert float(train.mean()) == pytest.approx(0, abs=1e-5)
    assert float(train.std()) == pytest.approx(1, rel=1e-3)


def test_digits_convnet_has_no_batchnorm_and_the_variant_has() -> None:
    def has_batchnorm(model: str) -> bool:
        return any(isinstance(m, nn.BatchNorm2d) for m in build_task("digits", {"model": model}).model().modules())

    assert not has_batchnorm("convnet")
    assert has_batchnorm("batchnorm")


def test_digits_augmentation_shifts_by_at_most_a_pixel_and_draws_all_nine_shifts() -> None:
    plain, shifted = (build_task("digits", {"augment": a}).train_set for a in (False, True))
    image = plain[7][0][0]
    background = image.min()
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        got = shifted[7][0][0]
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                wanted = torch.full((10, 10), float(background))
                wanted[1 - down : 9 - down, 1 - right : 9 - right] = image
                if torch.allclose(got, wanted[1:9, 1:9]):
                    seen.add((down, right))
                    break
            else:
                continue
            break
        else:
            pytest.fail(f"no shift by at most a pixel gives\n{got}")
    assert len(seen) == 9
    assert torch.equal(build_task("digits").eval_set[0][0], build_task("digits").eval_set[0][0])


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_digits_augmentation_belongs_to_the_position(loader_workers: int) -> None:
    task = build_task("digits")

    def read(workers: int) -> torch.Tensor:
        loader = PositionLoader(task.train_set, index_of=lambda p: p % 5, seed=1, loader_workers=workers)
        loader.set_course([(0, 20), (20, 20)])
        images = torch.cat([loader.take(0, 20)[0], loader.take(20, 20)[0]])
        loader.close()
        return images

    images = read(loader_workers)
    assert torch.equal(images, read(0))
    assert len(images.unique(dim=0)) > 15, "one scan is shifted differently at different positions"


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_digits_label_noise_changes_nine_tenths_of_its_fraction_of_training_labels_only(fraction: float) -> None:
    clean, noisy = build_task("digits"), build_task("digits", {"label_noise": fraction}, seed=5)
    wrong = (clean.train_set.labels != noisy.train_set.labels).float().mean()
    assert float(wrong) == pytest.approx(0.9 * fraction, abs=0.025)
    assert torch.equal(clean.eval_set.labels, noisy.eval_set.labels)
    again = build_task("digits", {"label_noise": fraction})
    assert torch.equal(again.train_set.labels, noisy.train_set.labels)


def test_digits_more_label_noise_keeps_what_was_wrong_wrong() -> None:
    clean, some, more = (build_task("digits", {"label_noise": f}).train_set.labels for f in (0.0, 0.1, 0.3))
    wrong = some != clean
    assert torch.equal(some[wrong], more[wrong])


def test_digits_is_learned_in_a_few_epochs() -> None:
    torch.manual_seed(0)
    task = build_task("digits", {"width": 16})
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4 * 1437 // 32):
        order = [(32 * step + i) * 463 % 1437 for i in range(32)]  # 463 and 1437 have no common factor
        optimizer.zero_grad()
        task.loss(model, default_collate([task.train_set[i] for i in order])).backward()
        optimizer.step()
    with torch.no_grad():
        metrics = task.metrics(model.eval(), batch_of(task.eval_set, 360))
    assert float(metrics["accuracy"]) >= 0.97


# char_lm


def test_char_lm_windows_are_the_text_and_the_held_out_ones_its_end(tmp_path: Path) -> None:
    text = "".join(chr(ord("a") + i % 26) + "äß€🙂"[i % 4] for i in range(500))
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    task = build_task("char_lm", {**SMALL_LM, "text": str(path), "held_out_fraction": 0.2})

    def spelled(dataset: Any) -> str:
        return "".join(task.vocabulary[int(t)] for i in range(len(dataset)) for t in dataset[i])

    train, held_out = spelled(task.train_set), spelled(task.eval_set)
    assert text.startswith(train + held_out)
    assert len(text) - len(train + held_out) < 17
    assert len(task.eval_set) == round(0.2 * (len(task.train_set) + len(task.eval_set)))
    assert task.train_set[0].shape == (17,)


def test_char_lm_reads_the_language_reference_by_default() -> None:
    task = build_task("char_lm", SMALL_LM)
    count = (len(task.train_set) + len(task.eval_set)) * 17
    assert count > 300_000
    assert {"d", "e", "f", " ", "\n"} <= set(task.vocabulary)


def test_char_lm_never_looks_ahead() -> None:
    model = build_task("char_lm", SMALL_LM).model().eval()
    tokens = torch.arange(16).view(1, 16)
    changed = tokens.clone()
    changed[0, 9:] += 20
    with torch.no_grad():
        one, other = model(tokens), model(changed)
    assert torch.allclose(one[:, :9], other[:, :9], atol=1e-6)
    assert not torch.allclose(one[:, 9:], other[:, 9:], atol=1e-3)


def test_char_lm_dropout_only_while_training() -> None:
    model = build_task("char_lm", {**SMALL_LM, "dropout": 0.5}).model()
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))


def test_char_lm_learns_a_rule(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("abcd" * 2000)
    task = build_task("char_lm", {**SMALL_LM, "text": str(tmp_path / "t")})
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, batch_of(task.train_set, 16)).backward()
        optimizer.step()
    with torch.no_grad():
        metrics = {k: float(v) for k, v in task.metrics(model.eval(), batch_of(task.eval_set, 16)).items()}
    assert metrics["accuracy"] > 0.99
    assert metrics["bits_per_character"] < 0.1
    assert metrics["bits_per_character"] == pytest.approx(metrics["loss"] / math.log(2))


# What is refused

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


def test_char_lm_refuses_text_that_is_not_utf8_or_too_short(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(TaskError, match="not UTF-8: byte 0xe9 at offset 3"):
        build_task("char_lm", {"text": str(path)})
    path.write_text("a" * 33)
    with pytest.raises(TaskError, match=r"33 characters.* context of at most 15"):
        build_task("char_lm", {**SMALL_LM, "text": str(path)})
    assert len(build_task("char_lm", {**SMALL_LM, "context": 15, "text": str(path)}).eval_set) == 1
    path.write_text("")
    with pytest.raises(TaskError, match="0 characters"):
        build_task("char_lm", {"text": str(path)})
    with pytest.raises(TaskError, match="could not be read"):
        build_task("char_lm", {"text": str(tmp_path)})


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
