"""The digits: a fixed split, augmentation by position, label noise as large as asked, and a task that is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from orchestrator.runtime.loader import PositionLoader
from orchestrator.tasks.protocol import build_task
from tests.unit.small_tasks import batch_of


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
