"""Handwritten digits: the 1,797 scans of 8 x 8 pixels that come with scikit-learn.

Small enough to finish in a minute on one core, and hard enough that a net which is merely large does not get them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from orchestrator.errors import TaskError

HELD_OUT = 360  # of 1,797
CLASSES = 10
_SPLIT_SEED = 20_240_501
_NOISE_SEED = 20_240_502
_MODELS = ("convnet", "batchnorm")


def digits(*, model: str = "convnet", width: int = 32, augment: bool = True, label_noise: float = 0.0) -> DigitsTask:
    """The task ``digits``.

    ``model``: ``convnet`` (no BatchNorm), or ``batchnorm``, whose statistics depend on the micro-batch. ``width``:
    channels of the first layer, a multiple of 8. ``augment``: shift training scans by up to one pixel. ``label_noise``:
    fraction of the training labels replaced by random ones, always the same.
    """
    if model not in _MODELS:
        raise TaskError(f"digits: model must be one of {', '.join(_MODELS)}, got {model!r}")
    if isinstance(width, bool) or not isinstance(width, int) or width < 8 or width % 8:
        raise TaskError(f"digits: width must be a multiple of 8, such as 32, got {width!r}")
    if not isinstance(augment, bool):
        raise TaskError(f"digits: augment must be true or false, got {augment!r}")
    if isinstance(label_noise, bool) or not isinstance(label_noise, (int, float)) or not 0 <= label_noise <= 1:
        raise TaskError(f"digits: label_noise must be a fraction between 0 and 1, got {label_noise!r}")
    return DigitsTask(kind=model, width=width, augment=augment, label_noise=float(label_noise))


@final
class DigitsTask:
    """See ``digits``. A batch is (images [n, 1, 8, 8] of mean 0 and deviation 1, labels [n])."""

    def __init__(self, *, kind: str, width: int, augment: bool, label_noise: float) -> None:
        images, labels = _scans()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
        mean, deviation = images[rest].mean(), images[rest].std()
        images = (images - mean) / deviation
        background = float(-mean / deviation)
        self.train_set = DigitScans(
            images[rest], _noisy(labels[rest], label_noise), background=background, augment=augment
        )
        self.eval_set = DigitScans(images[held_out], labels[held_out], background=background, augment=False)
        self._kind = kind
        self._width = width

    def model(self) -> nn.Module:
        return convnet(self._width, batchnorm=self._kind == "batchnorm")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        images, labels = batch
        scores = model(images)
        return {
            "loss": functional.cross_entropy(scores, labels),
            "accuracy": (scores.argmax(dim=1) == labels).float().mean(),
        }


@final
class DigitScans(Dataset[tuple[Tensor, Tensor]]):
    """``images`` [n, 1, 8, 8] with ``labels`` [n]; ``augment`` draws a shift from torch's global generator."""

    def __init__(self, images: Tensor, labels: Tensor, *, background: float, augment: bool) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        # A frame of background, so that a shift is one slice.
        self._framed = functional.pad(images, (1, 1, 1, 1), value=background)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not self.augment:
            return self.images[index], self.labels[index]
        down, right = torch.randint(0, 3, (2,)).tolist()
        return self._framed[index, :, down : down + 8, right : right + 8], self.labels[index]


def convnet(width: int, *, batchnorm: bool = False) -> nn.Sequential:
    """Scores [n, 10] of images [n, 1, 8, 8]: three convolutions, one halving of the size, one linear layer."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batchnorm else nn.GroupNorm(channels // 8, channels)

    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        norm(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
        norm(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, CLASSES),
    )


def _scans() -> tuple[Tensor, Tensor]:
    # Imported here: scikit-learn takes a second to import, and most of what imports this module wants no data.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels, dtype=torch.int64)


def _noisy(labels: Tensor, fraction: float) -> Tensor:
    """``labels`` with a ``fraction`` of them drawn anew from all classes (so a tenth of those stays right)."""
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    # Chosen by one order for every fraction: what is wrong at a small fraction is wrong at a larger one as well.
    chosen = torch.randperm(len(labels), generator=generator)[: math.floor(fraction * len(labels) + 0.5)]
    drawn = torch.randint(0, CLASSES, (len(labels),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = drawn[chosen]
    return noisy
