"""Tasks that are sound but for one fault, and what a run of any of them must tell and leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from orchestrator.core.cursor import Stream
from tests.support import blobs, cross_entropy, mlp
from tests.unit.small_runs import (
    ACCEPTED,
    BATCH,
    MICRO,
    STEPS,
    assert_readable,
    events,
    groundswell,
    rows_of,
    saved_steps,
    settings_of,
)


class Sound:
    """A task without a fault; the broken ones differ from it in one place."""

    def __init__(self) -> None:
        self.train_set: Any = blobs()
        self.eval_set: Any = blobs(24, seed=7)
        self.calls = -1  # of loss(), counted from 0

    def model(self) -> Any:
        return mlp()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        return cross_entropy(model, batch)

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).double().mean()}

    @property
    def in_step(self) -> int:
        """The step that loss() is called in, while micro-batches have their full size."""
        return self.calls // (BATCH // MICRO)


def loss_that(change: Callable[[Any, Tensor], Any]) -> Callable[[], Any]:
    class Changed(Sound):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            return change(self, super().loss(model, batch))

    return Changed


def data_of(make: Callable[[], Any], *, part: str = "train_set") -> Callable[[], Any]:
    def factory() -> Any:
        sound = Sound()
        setattr(sound, part, make())
        return sound

    return factory


def model_of(make: Callable[[], Any]) -> Callable[[], Any]:
    class Changed(Sound):
        def model(self) -> Any:
            return make()

    return Changed


def metrics_that(give: Callable[[], Any]) -> Callable[[], Any]:
    class Changed(Sound):
        def metrics(self, model: nn.Module, batch: Any) -> Any:
            return give()

    return Changed


class Stored(Dataset[Any]):
    """The samples of ``blobs``, one of them changed, under a length that may be a lie."""

    def __init__(self, change: Callable[[int, Any], Any], *, length: int = 256) -> None:
        self._samples, self._change, self._length = blobs(), change, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._change(index, self._samples[index])


BAD_INDEX = 17
BAD_POSITION = [int(i) for i in Stream(size=256, seed=0).indices(range(256))].index(BAD_INDEX)
BAD_STEP = BAD_POSITION // BATCH


def where_bad(change: Callable[[Any], Any]) -> Callable[[], Any]:
    return data_of(lambda: Stored(lambda index, sample: change(sample) if index == BAD_INDEX else sample))


def fails(error: Exception) -> Any:
    raise error


FULL = float("inf")
loss_is_nan = loss_that(lambda task, loss: loss * (FULL - FULL if task.in_step == 2 else 1))
# The tasks by the name that a config gives; every TaskCase adds its own.
KINDS: dict[str, Callable[[], Any]] = {"sound": Sound, "loss is NaN": loss_is_nan}


def task(kind: str) -> Any:
    return KINDS[kind]()


@dataclass(frozen=True)
class TaskCase:
    """A broken task, which a config finds by its name.

    ``told`` is what the user must be told; ``saved`` the step of a checkpoint that must be there then. Where the run
    does not recover, the command must end with an exit code other than zero.
    """

    name: str
    make: Callable[[], Any]
    told: tuple[str, ...]
    recovers: bool = False
    own: bool = False  # the error is one of the task's code, raised as it is
    sections: dict[str, Any] = field(default_factory=dict)
    trained: int = 0  # steps
    saved: int | None = None

    def __post_init__(self) -> None:
        KINDS[self.name] = self.make


def check_told_and_kept(tmp_path: Path, case: TaskCase) -> None:
    """``groundswell run`` of the case: its words, its exit code, its files; then mended, and resumed to the end."""
    settings = settings_of(tmp_path, case.name, **case.sections)
    result = groundswell(settings)
    assert (result.exit_code == 0) is case.recovers, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    # A traceback helps where the user's own code raised, and nowhere else.
    assert "Traceback" not in result.output or case.own
    # A recovery is told in the events; how much of them is shown is the live view's affair.
    said = " ".join(e["reason"] for e in events(tmp_path)) if case.recovers else result.output
    for words in case.told:
        assert words in said
    assert_readable(tmp_path)
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(case.trained))
    if events(tmp_path, "started") and not case.recovers:
        (fault,) = events(tmp_path, "fault")
        assert case.told[-1] in fault["reason"]
    if case.saved is not None:
        assert saved_steps(tmp_path)[-1] == case.saved
    if not case.recovers and events(tmp_path, "started"):
        # Mended, the run goes on from what it had.
        again = groundswell(settings, "--set", "task.options.kind=sound", "--set", ACCEPTED, "--resume")
        assert again.exit_code == 0, again.output
        assert rows_of(tmp_path, "step")[-1] == (STEPS - 1,)
        assert_readable(tmp_path)
