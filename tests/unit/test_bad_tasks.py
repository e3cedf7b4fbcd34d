"""A broken task is a clear error that keeps what was trained: factories, data, models, losses and metrics.

Losses that are not finite are in ``test_non_finite.py``, tasks that need too much memory in ``test_out_of_memory.py``,
broken configs in ``test_config_errors.py``, faults of one rank of several in ``tests/dist/test_bad_input_ranks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from tests.support import blobs, mlp
from tests.unit.broken_tasks import (
    BAD_INDEX,
    BAD_POSITION,
    BAD_STEP,
    Sound,
    Stored,
    TaskCase,
    check_told_and_kept,
    data_of,
    fails,
    loss_that,
    metrics_that,
    model_of,
    where_bad,
)
from tests.unit.small_runs import STEPS


class Lines(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(blobs())


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def at_once(name: str, make: Callable[[], Any], *told: str, **more: Any) -> TaskCase:
    return TaskCase(name, make, told, **more)


def at_sample(name: str, change: Callable[[Any], Any], *told: str, **more: Any) -> TaskCase:
    """One sample is changed; the steps before it are trained."""
    return TaskCase(name, where_bad(change), told, trained=BAD_STEP, **more)


def at_the_end(name: str, give: Callable[[], Any], *told: str, **more: Any) -> TaskCase:
    """Metrics are first asked for when everything is trained."""
    return TaskCase(name, metrics_that(give), told, trained=STEPS, saved=STEPS, **more)


TASKS = [
    # The factory and the parts
    at_once("factory raises", lambda: fails(OSError("no such disk")), "its factory raised OSError: no such disk"),
    at_once("factory returns nothing", lambda: None, "NoneType has no method model()"),
    at_once("no loss", lambda: type("T", (Sound,), {"loss": None})(), "has no method loss()"),
    at_once("no metrics", lambda: type("T", (Sound,), {"metrics": None})(), "has no method metrics()"),
    at_once("iterable data", data_of(Lines), "train_set", "an iterable data set"),
    at_once("empty data", data_of(list), "train_set", "is empty"),
    at_once("empty held-out data", data_of(list, part="eval_set"), "eval_set", "is empty"),
    at_once("no data", data_of(lambda: None), "train_set", "this is None"),
    at_once("data smaller than a batch", data_of(lambda: blobs(31)), "31 samples", "batch.initial is 32", "31 or less"),
    at_once("no model", model_of(lambda: None), "model() must return one torch.nn.Module", "NoneType"),
    at_once("two models", model_of(lambda: (mlp(), mlp())), "model() must return one", "do not fit"),
    at_once("model without parameters", model_of(nn.Tanh), "no parameters", "nothing to train"),
    at_once("frozen model", model_of(lambda: frozen(mlp())), "requires_grad=False", "nothing to train"),
    at_once("lazy model", model_of(lambda: nn.LazyLinear(4)), "lazy parameters"),
    # Samples
    at_sample(
        "sample raises",
        lambda sample: fails(ValueError("broken jpeg")),
        f"stream position {BAD_POSITION} (dataset index {BAD_INDEX})",
        "ValueError: broken jpeg",
    ),
    at_sample(
        "sample of another shape",
        lambda sample: (sample[0][:19], sample[1]),
        "no batch could be made",
        f"{BAD_INDEX}",
        "alike in shape",
    ),
    at_sample("sample is nothing", lambda sample: None, "no batch could be made", f"{BAD_INDEX}"),
    at_once(
        "length is a lie",
        data_of(lambda: Stored(lambda index, sample: sample, length=1 << 20)),
        "stream position 0 (dataset index",
        "IndexError",
    ),
    at_sample("label out of range", lambda sample: (sample[0], torch.tensor(4)), "Target 4", own=True),
    at_once("model of other features", model_of(lambda: mlp(features=21)), "mat1 and mat2", own=True),
    # The loss
    at_once("loss per sample", loss_that(lambda task, loss: loss.expand(8)), "the loss has shape (8,)"),
    at_once("loss is a number", loss_that(lambda task, loss: loss.item()), "loss", "float"),
    at_once("loss is nothing", loss_that(lambda task, loss: None), "loss", "NoneType"),
    at_once("loss without a gradient", loss_that(lambda task, loss: loss.detach()), "the loss", "gradient"),
    # The metrics
    at_the_end("metrics raise", lambda: fails(KeyError("f1")), "f1", own=True),
    at_the_end("metrics are nothing", lambda: None, "metrics"),
    at_the_end("a metric per sample", lambda: {"accuracy": torch.zeros(8)}, "accuracy"),
    at_the_end("a metric is NaN", lambda: {"odd": float("nan")}, recovers=True),
    # Names in the config that are found out only now
    at_once(
        "optimizer that is not there",
        Sound,
        "torch.optim",
        "SDG",
        "did you mean",
        sections={"optimizer": {"name": "torch.optim:SDG", "momentum": None}, "lr_rule": {"name": "sqrt"}},
    ),
]


@pytest.mark.parametrize("case", TASKS, ids=lambda case: case.name)
def test_a_broken_task_is_told_and_what_was_trained_is_kept(tmp_path: Path, case: TaskCase) -> None:
    check_told_and_kept(tmp_path, case)


def test_the_table_holds_at_least_25_broken_tasks() -> None:
    assert len(TASKS) >= 25
