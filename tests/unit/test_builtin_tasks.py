"""The contract that every built-in task keeps, in every variant of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from orchestrator.tasks.protocol import Task, build_task, check_task
from tests.unit.small_tasks import SMALL_LM, batch_of

TASKS = [
    ("digits", {"width": 8}),
    ("digits", {"width": 8, "model": "batchnorm"}),
    ("digits", {"width": 8, "augment": False, "label_noise": 0.5}),
    ("char_lm", SMALL_LM),
    ("char_lm", {**SMALL_LM, "dropout": 0.2}),
]


@pytest.fixture(params=TASKS, ids=str)
def task(request: pytest.FixtureRequest) -> Task:
    return build_task(*request.param)


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
