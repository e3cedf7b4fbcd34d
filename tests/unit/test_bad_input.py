"""Broken tasks, checkpoints, run folders and storage, in tables: each is a clear error or a recovery, nothing lost.

Broken configs have a table of their own in ``test_config_errors.py``, and what happens on several ranks is in
``tests/dist/test_bad_input_ranks.py``.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from launch.cli import main
from orchestrator.config import RunConfig
from orchestrator.config_file import to_yaml
from orchestrator.core.cursor import Stream
from orchestrator.errors import CheckpointError, GroundswellError, NonFiniteError, RunFolderError, StorageError
from orchestrator.runtime import folder, ledger
from orchestrator.runtime.checkpoints import CheckpointStore, verify
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from orchestrator.train import train
from tests.support import blobs, config, cross_entropy, mlp, run_fleet

STEPS, BATCH, MICRO = 6, 32, 8
ME = "tests.unit.test_bad_input"


def settings_of(path: Path, kind: str = "sound", **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "task": {"name": f"{ME}:task", "options": {"kind": kind}},
        "train": {"samples": STEPS * BATCH},
        "batch": {"initial": BATCH, "micro_batch": MICRO, "max": BATCH},
        "ledger": True,
    }
    return config(path, **(base | sections))


def groundswell(settings: RunConfig, *arguments: str) -> Result:
    """``groundswell run`` of ``settings``, in this process."""
    run = Path(settings.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    file = run / "given.yaml"
    file.write_text(to_yaml(settings))
    return CliRunner().invoke(main, ["run", str(file), "--runtime", "local", *arguments])


def events(path: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if not kinds or row["kind"] in kinds]


def rows_of(path: Path, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in keys) for row in folder.surviving(path / "run" / folder.METRICS)]


def saved_steps(path: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (path / "run" / "checkpoints").glob("step-0*"))


def assert_readable(path: Path) -> None:
    """Every line of the run's files can be read, and every checkpoint is whole."""
    for name in (folder.EVENTS, folder.METRICS, folder.EVALS, folder.LEDGER):
        list(folder.rows(path / "run" / name))
    for checkpoint in (path / "run" / "checkpoints").glob("step-*"):
        assert verify(checkpoint) is None, checkpoint
    if (path / "run" / folder.LEDGER).exists():
        assert ledger.verify(path / "run").violation is None


# Tasks


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


KINDS: dict[str, Callable[[], Any]] = {"sound": Sound}


def task(kind: str) -> Any:
    return KINDS[kind]()


def kind(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(factory: Callable[[], Any]) -> Callable[[], Any]:
        KINDS[name] = factory
        return factory

    return register


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


class Lines(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(blobs())


class NanBackward(torch.autograd.Function):
    """The loss as it is, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


class Hungry(nn.Module):
    """Needs more memory than there is for more than ``most`` samples, in the forward or in the backward pass."""

    def __init__(self, model: nn.Module, *, most: int, in_backward: bool = False, really: bool = False) -> None:
        super().__init__()
        self.model, self.most, self.in_backward, self.really = model, most, in_backward, really

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model(inputs)
        if self.training and len(inputs) > self.most:
            if self.in_backward:
                out.register_hook(lambda gradient: self._eat())
            else:
                self._eat()
        return out

    def _eat(self) -> None:
        if self.really:
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("planted: out of memory")


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


FULL = float("inf")


@dataclass(frozen=True)
class TaskCase:
    """``told`` is what the user must be told; ``saved`` the step of a checkpoint that must be there then.

    Where the run does not recover, the command must end with an exit code other than zero.
    """

    name: str
    make: Callable[[], Any]
    told: tuple[str, ...]
    recovers: bool = False
    own: bool = False  # the error is one of the task's code, raised as it is
    sections: dict[str, Any] = field(default_factory=dict)
    trained: int = 0  # steps
    saved: int | None = None


NUMBERS = "step {step}: {what} is not finite", "stream positions {first} to {last}", "saved in"


def non_finite(name: str, make: Callable[[], Any], what: str, *, step: int = 2, **more: Any) -> TaskCase:
    words = {"step": step, "what": what, "first": step * BATCH, "last": step * BATCH + BATCH - 1}
    told = tuple(each.format(**words) for each in NUMBERS)
    return TaskCase(name, make, told, trained=step, saved=step, **more)


def nan_gradient_in(step: int) -> Callable[[], Any]:
    return loss_that(lambda task, loss: NanBackward.apply(loss) if task.in_step == step else loss)


SELDOM = {"measure": {"every_steps": 2}}
TASKS = [
    # The factory and the parts
    TaskCase("factory raises", lambda: fails(OSError("no such disk")), ("its factory raised OSError: no such disk",)),
    TaskCase("factory returns nothing", lambda: None, ("NoneType has no method model()",)),
    TaskCase("no loss", lambda: type("T", (Sound,), {"loss": None})(), ("has no method loss()",)),
    TaskCase("no metrics", lambda: type("T", (Sound,), {"metrics": None})(), ("has no method metrics()",)),
    TaskCase("iterable data", data_of(Lines), ("train_set", "an iterable data set")),
    TaskCase("empty data", data_of(list), ("train_set", "is empty")),
    TaskCase("empty held-out data", data_of(list, part="eval_set"), ("eval_set", "is empty")),
    TaskCase("no data", data_of(lambda: None), ("train_set", "this is None")),
    TaskCase(
        "data smaller than a batch", data_of(lambda: blobs(31)), ("31 samples", "batch.initial is 32", "31 or less")
    ),
    TaskCase("no model", model_of(lambda: None), ("model() must return one torch.nn.Module", "NoneType")),
    TaskCase("two models", model_of(lambda: (mlp(), mlp())), ("model() must return one", "do not fit")),
    TaskCase("model without parameters", model_of(nn.Tanh), ("no parameters", "nothing to train")),
    TaskCase("frozen model", model_of(lambda: frozen(mlp())), ("requires_grad=False", "nothing to train")),
    TaskCase("lazy model", model_of(lambda: nn.LazyLinear(4)), ("lazy parameters",)),
    # Samples
    TaskCase(
        "sample raises",
        where_bad(lambda sample: fails(ValueError("broken jpeg"))),
        (f"stream position {BAD_POSITION} (dataset index {BAD_INDEX})", "ValueError: broken jpeg"),
        trained=BAD_STEP,
    ),
    TaskCase(
        "sample of another shape",
        where_bad(lambda sample: (sample[0][:19], sample[1])),
        ("no batch could be made", f"{BAD_INDEX}", "alike in shape"),
        trained=BAD_STEP,
    ),
    TaskCase(
        "sample is nothing",
        where_bad(lambda sample: None),
        ("no batch could be made", f"{BAD_INDEX}"),
        trained=BAD_STEP,
    ),
    TaskCase(
        "length is a lie",
        data_of(lambda: Stored(lambda index, sample: sample, length=1 << 20)),
        ("stream position 0 (dataset index", "IndexError"),
    ),
    TaskCase(
        "label out of range",
        where_bad(lambda sample: (sample[0], torch.tensor(4))),
        ("Target 4",),
        own=True,
        trained=BAD_STEP,
    ),
    TaskCase("model of other features", model_of(lambda: mlp(features=21)), ("mat1 and mat2",), own=True),
    # The loss
    TaskCase("loss per sample", loss_that(lambda task, loss: loss.expand(8)), ("the loss has shape (8,)",)),
    TaskCase("loss is a number", loss_that(lambda task, loss: loss.item()), ("loss", "float")),
    TaskCase("loss is nothing", loss_that(lambda task, loss: None), ("loss", "NoneType")),
    TaskCase("loss without a gradient", loss_that(lambda task, loss: loss.detach()), ("the loss", "gradient")),
    non_finite(
        "loss is NaN", loss_that(lambda task, loss: loss * (FULL - FULL if task.in_step == 2 else 1)), "the loss"
    ),
    non_finite("loss is infinite", loss_that(lambda task, loss: loss + (FULL if task.in_step == 2 else 0)), "the loss"),
    non_finite("loss is NaN at once", loss_that(lambda task, loss: loss * float("nan")), "the loss", step=0),
    non_finite("a sample is NaN", where_bad(lambda sample: (sample[0] * FULL, sample[1])), "the loss", step=BAD_STEP),
    non_finite("gradient is NaN", nan_gradient_in(2), "the gradient"),
    non_finite("gradient is NaN in a step not measured", nan_gradient_in(3), "the gradient", step=3, sections=SELDOM),
    # The metrics, which are first asked for when everything is trained
    TaskCase(
        "metrics raise", metrics_that(lambda: fails(KeyError("f1"))), ("f1",), own=True, trained=STEPS, saved=STEPS
    ),
    TaskCase("metrics are nothing", metrics_that(lambda: None), ("metrics",), trained=STEPS, saved=STEPS),
    TaskCase(
        "a metric per sample",
        metrics_that(lambda: {"accuracy": torch.zeros(8)}),
        ("accuracy",),
        trained=STEPS,
        saved=STEPS,
    ),
    TaskCase(
        "a metric is NaN", metrics_that(lambda: {"odd": float("nan")}), (), recovers=True, trained=STEPS, saved=STEPS
    ),
    # Memory
    TaskCase(
        "one sample does not fit",
        model_of(lambda: Hungry(mlp(), most=0)),
        ("a micro-batch of one sample does not fit in memory", "smaller model or sample"),
    ),
    TaskCase(
        "three samples fit",
        model_of(lambda: Hungry(mlp(), most=3)),
        ("at most 4", "at most 2"),
        recovers=True,
        trained=STEPS,
        saved=STEPS,
    ),
    TaskCase(
        "the allocator refuses five samples",
        model_of(lambda: Hungry(mlp(), most=4, really=True)),
        ("at most 4",),
        recovers=True,
        trained=STEPS,
        saved=STEPS,
    ),
    TaskCase(
        "five samples do not fit in the backward pass",
        model_of(lambda: Hungry(mlp(), most=4, in_backward=True)),
        ("at most 4",),
        recovers=True,
        trained=STEPS,
        saved=STEPS,
    ),
    # Names in the config that are found out only now
    TaskCase(
        "optimizer that is not there",
        Sound,
        ("torch.optim", "SDG", "did you mean"),
        sections={"optimizer": {"name": "torch.optim:SDG", "momentum": None}, "lr_rule": {"name": "sqrt"}},
    ),
]
KINDS |= {case.name: case.make for case in TASKS}


@pytest.mark.parametrize("case", TASKS, ids=lambda case: case.name)
def test_a_broken_task_is_told_and_what_was_trained_is_kept(tmp_path: Path, case: TaskCase) -> None:
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
        again = groundswell(settings, "--set", "task.options.kind=sound", "--resume")
        assert again.exit_code == 0, again.output
        assert rows_of(tmp_path, "step")[-1] == (STEPS - 1,)
        assert_readable(tmp_path)


NOT_FINITE = [case for case in TASKS if case.told and "is not finite" in case.told[0]]


class Normalised(Sound):
    """With a layer that remembers what went through it."""

    def model(self) -> Any:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


def state_before(path: Path, make: Callable[[], Any], step: int, **sections: Any) -> dict[str, Tensor]:
    """The model's state after ``step`` steps of a sound run with the same model."""
    task = make()
    settings = settings_of(path, **sections)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for each in session:
            for batch in each:
                if session.step_number == step:
                    return {name: value.clone() for name, value in model.state_dict().items()}
                session.backward(cross_entropy(session.model, batch))
            session.step()
    raise AssertionError(f"the run has no step {step}")


@pytest.mark.parametrize("case", NOT_FINITE, ids=lambda case: case.name)
def test_what_is_saved_before_a_non_finite_step_is_the_state_before_it(tmp_path: Path, case: TaskCase) -> None:
    settings = settings_of(tmp_path / "broken", case.name, **case.sections)
    with pytest.raises(NonFiniteError) as caught:
        train(settings, local_worker(settings), resume=False)
    assert case.saved is not None
    assert_saved_state_is_that_of_a_sound_run(tmp_path, Sound, case.saved, str(caught.value), **case.sections)


@pytest.mark.filterwarnings("ignore:1 BatchNorm")
def test_a_non_finite_sample_does_not_reach_the_saved_statistics_of_a_layer(tmp_path: Path) -> None:
    def make() -> Any:
        poisoned = Normalised()
        poisoned.train_set = where_bad(lambda sample: (sample[0] * FULL, sample[1]))().train_set
        return poisoned

    KINDS["normalised"] = make
    settings = settings_of(tmp_path / "broken", "normalised")
    with pytest.raises(NonFiniteError) as caught:
        train(settings, local_worker(settings), resume=False)
    assert_saved_state_is_that_of_a_sound_run(tmp_path, Normalised, BAD_STEP, str(caught.value))


def assert_saved_state_is_that_of_a_sound_run(
    path: Path, make: Callable[[], Any], step: int, told: str, **sections: Any
) -> None:
    model = make().model()
    store = CheckpointStore(path / "broken" / "run" / "checkpoints", keep=2, collective=Solo())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    checkpoint, meta, faults = store.load_latest(model, optimizer)
    assert str(checkpoint) in told
    assert (meta["step"], meta["samples_seen"], faults) == (step, step * BATCH, ())
    expected = state_before(path / "sound", make, step, **sections)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_where_a_non_finite_step_cannot_be_saved_the_error_says_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "loss is NaN")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(NonFiniteError) as caught:
        train(settings, local_worker(settings), resume=False)
    assert "saved in None" not in str(caught.value)
    assert "could not be saved" in str(caught.value)


# Out of memory: the same samples again, exactly once, in smaller pieces


class Appetite:
    """The most samples that fit, which the test changes on the way."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most

    def model(self) -> nn.Module:
        return mlp()

    def check(self, samples: Any) -> None:
        if len(samples[0]) > self.most:
            raise torch.OutOfMemoryError("planted: out of memory")


def ramped(path: Path, **more: Any) -> RunConfig:
    control = {"policy": "schedule", "ramp": [[64, 32]], "every_samples": 64, "lag_steps": 3, "deadband": 1.0}
    batch = {"initial": 16, "micro_batch": 8, "max": 32}
    return config(path, train={"samples": 320}, batch=batch, controller=control, ledger=True, **more)


def run_with(
    settings: RunConfig, appetite: Appetite, *, hungry_from: int, most: int, resume: bool = False
) -> nn.Module:
    model = appetite.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss(samples: Any) -> Tensor:
        appetite.check(samples)
        return cross_entropy(model, samples)

    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume) as session:
        for step in session:
            appetite.most = most if session.step_number >= hungry_from else 1000
            for samples in step:
                session.backward(lambda samples=samples: loss(samples))
            session.step()
    return model


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fed")
    run_with(ramped(path), Appetite(), hungry_from=1000, most=1000)
    assert {batch for (batch,) in rows_of(path, "global_batch")} == {16, 32}
    (growth,) = [e for e in events(path, "decision") if "effective_step" in e]
    assert (growth["step"], growth["effective_step"]) == (3, 7)
    return path


# Decided after step 3, announced in step 6, in effect from step 7 on.
@pytest.mark.parametrize(("hungry_from", "most"), [*((step, 4) for step in range(9)), (0, 1), (3, 1), (6, 1), (7, 3)])
def test_running_out_of_memory_changes_no_batch_and_no_decision_wherever_it_happens(
    tmp_path: Path, fed: Path, hungry_from: int, most: int
) -> None:
    run_with(ramped(tmp_path), Appetite(), hungry_from=hungry_from, most=most)
    keys = ("step", "samples_seen", "global_batch", "lr")
    assert rows_of(tmp_path, *keys) == rows_of(fed, *keys)
    sizes = [(8 if step < hungry_from else {4: 4, 3: 2, 1: 1}[most]) for (step,) in rows_of(fed, "step")]
    assert [size for (size,) in rows_of(tmp_path, "micro_batch")] == sizes
    assert ledger.verify(tmp_path / "run").violation is None
    decided = [
        [(e["step"], e["target_batch"], e["reason"]) for e in events(path, "decision")] for path in (tmp_path, fed)
    ]
    assert decided[0] == decided[1]
    rejected = events(tmp_path, "plan_rejected")
    assert [e["step"] for e in rejected] == [hungry_from] * {4: 1, 3: 2, 1: 3}[most]
    assert all("out of memory" in e["reason"] for e in rejected)


def test_a_smaller_micro_batch_after_memory_ran_out_trains_like_one_that_was_configured(tmp_path: Path) -> None:
    small = run_with(
        ramped(tmp_path / "small").model_copy(
            update={"batch": ramped(tmp_path).batch.model_copy(update={"micro_batch": 2})}
        ),
        Appetite(),
        hungry_from=1000,
        most=1000,
    )
    halved = run_with(ramped(tmp_path / "halved"), Appetite(), hungry_from=0, most=3)
    keys = ("step", "loss", "grad_sq", "trace_cov", "micro_batch")
    assert rows_of(tmp_path / "halved", *keys) == rows_of(tmp_path / "small", *keys)
    for a, b in zip(small.parameters(), halved.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_remembers_what_did_not_fit(tmp_path: Path) -> None:
    run_with(ramped(tmp_path), Appetite(), hungry_from=2, most=4)
    longer = ramped(tmp_path).model_copy(update={"train": ramped(tmp_path).train.model_copy(update={"samples": 640})})
    run_with(longer, Appetite(), hungry_from=0, most=4, resume=True)
    assert len(events(tmp_path, "plan_rejected")) == 1
    assert rows_of(tmp_path, "samples_seen", "micro_batch")[-1] == (640, 4)


def test_memory_that_runs_out_outside_of_backward_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        trained(tmp_path, model=Hungry(mlp(), most=4))
    assert "OutOfMemoryError: planted" in events(tmp_path, "fault")[0]["reason"]


# Checkpoints


def trained(path: Path, *, resume: bool = False, stop_in_step: int | None = None, **more: Any) -> None:
    """A run with a checkpoint at every second step, three kept."""
    sections: dict[str, Any] = {"checkpoint": {"every_samples": 2 * BATCH, "keep": 3}, "train": {"samples": 10 * BATCH}}
    settings = config(path, **(sections | more.pop("sections", {})))
    model = more.pop("model", None) or mlp()
    factory = more.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))
    dataset = more.pop("dataset", None) or blobs()
    with Session(
        settings, model=model, optimizer=factory(model.parameters()), dataset=dataset, resume=resume
    ) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped with the checkpoints of steps 4, 6 and 7."""
    path = tmp_path_factory.mktemp("stopped")
    trained(path, stop_in_step=6)
    assert saved_steps(path) == [4, 6, 7]
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    path = tmp_path_factory.mktemp("whole")
    trained(path)
    return rows_of(path, "step", "samples_seen", "loss", "grad_sq", "trace_cov", "noise_scale")


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def newest(run: Path) -> Path:
    return run / "run" / "checkpoints" / "step-000000007"


def tensors(run: Path) -> Path:
    (found,) = newest(run).glob("*.distcp")
    return found


def cut(file: Path, to: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * to)])


def flip(file: Path, at: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


def reseal(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a checkpoint's metadata and make its manifest agree, as another version's code would have written it."""
    meta = json.loads((checkpoint / "meta.json").read_text())
    store = CheckpointStore(checkpoint.parent.parent / "elsewhere", keep=1, collective=Solo())
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    written = store.save(model, optimizer, step=7, meta=change(meta) or meta)
    shutil.rmtree(checkpoint)
    written.rename(checkpoint)


def broken(run: Path, *steps: int) -> None:
    for step in steps:
        (file,) = (run / "run" / "checkpoints" / f"step-{step:09d}").glob("*.distcp")
        cut(file, 0.5)


def leftover(run: Path) -> None:
    partial = run / "run" / "checkpoints" / ".step-000000009.partial"
    shutil.copytree(newest(run), partial)
    cut(partial / "__0_0.distcp", 0.3)


def replaced_by_a_file(run: Path) -> None:
    shutil.rmtree(newest(run))
    newest(run).write_text("not a folder")


def emptied(run: Path) -> None:
    shutil.rmtree(newest(run))
    newest(run).mkdir()


Damage = Callable[[Path], Any]
# What was done, and what the event says about the newest checkpoint; None: it is still good.
RECOVERED: list[tuple[str, Damage, str | None]] = [
    ("tensors truncated", lambda run: cut(tensors(run), 0.5), "bytes"),
    ("tensors truncated by a byte", lambda run: cut(tensors(run), 0.9999), "bytes"),
    ("tensors empty", lambda run: cut(tensors(run), 0), "0 bytes"),
    ("a bit of the first tensor flipped", lambda run: flip(tensors(run), 0.2), "checksum"),
    ("a bit at the end flipped", lambda run: flip(tensors(run), 0.999), "checksum"),
    ("tensors missing", lambda run: tensors(run).unlink(), "FileNotFoundError"),
    ("tensor index missing", lambda run: (newest(run) / ".metadata").unlink(), "FileNotFoundError"),
    ("tensor index flipped", lambda run: flip(newest(run) / ".metadata", 0.5), "checksum"),
    ("manifest missing", lambda run: (newest(run) / "manifest.json").unlink(), "FileNotFoundError"),
    ("manifest truncated", lambda run: cut(newest(run) / "manifest.json", 0.6), "JSONDecodeError"),
    ("manifest empty", lambda run: cut(newest(run) / "manifest.json", 0), "JSONDecodeError"),
    ("manifest of nothing", lambda run: (newest(run) / "manifest.json").write_text("{}"), ""),
    ("manifest a list", lambda run: (newest(run) / "manifest.json").write_text("[]"), ""),
    ("manifest of numbers", lambda run: (newest(run) / "manifest.json").write_text('{"meta.json": 3}'), ""),
    ("manifest not text", lambda run: (newest(run) / "manifest.json").write_bytes(b"\xff\xfe\x00"), "Error"),
    ("metadata missing", lambda run: (newest(run) / "meta.json").unlink(), "FileNotFoundError"),
    ("metadata truncated", lambda run: cut(newest(run) / "meta.json", 0.5), "bytes"),
    ("metadata changed", lambda run: flip(newest(run) / "meta.json", 0.3), "checksum"),
    ("folder empty", emptied, "FileNotFoundError"),
    ("a file in the folder's place", replaced_by_a_file, "NotADirectoryError"),
    ("newest two broken", lambda run: broken(run, 6, 7), "bytes"),
    ("a partial one left over", leftover, None),
    ("a partial one without files", lambda run: (newest(run).parent / ".step-000000008.partial").mkdir(), None),
    ("foreign files beside", lambda run: (newest(run).parent / "step-best").mkdir(), None),
    ("a foreign file inside", lambda run: (newest(run) / "notes.txt").write_text("mine"), None),
    ("older ones gone", lambda run: [shutil.rmtree(newest(run).with_name(f"step-00000000{s}")) for s in (4, 6)], None),
]


@pytest.mark.parametrize(("damage", "told"), [c[1:] for c in RECOVERED], ids=[c[0] for c in RECOVERED])
def test_a_broken_checkpoint_is_passed_over_and_nothing_is_lost(
    run: Path, whole: list[tuple[Any, ...]], damage: Damage, told: str | None
) -> None:
    damage(run)
    trained(run, resume=True)
    passed = events(run, "checkpoint_passed_over")
    if told is None:
        assert passed == []
    else:
        assert str(newest(run)) in passed[0]["reason"]
        assert told in passed[0]["reason"]
    resumed_at = {None: 7}.get(told, 4 if len(passed) == 2 else 6)
    assert [e["step"] for e in events(run, "resumed")] == [resumed_at]
    assert rows_of(run, "step", "samples_seen", "loss", "grad_sq", "trace_cov", "noise_scale") == whole
    # What is kept can be used: the newest is the end's.
    assert saved_steps(run)[-1] == 10
    assert [verify(newest(run).with_name(f"step-{step:09d}")) for step in saved_steps(run)[-2:]] == [None, None]


def without(key: str) -> Damage:
    return lambda run: [reseal(newest(run), lambda meta: meta.pop(key) and None)]


@dataclass(frozen=True)
class Refusal:
    name: str
    damage: Damage
    told: tuple[str, ...]
    more: Callable[[], dict[str, Any]] = dict


FIT = ("does not fit this model and optimizer", "resume with the config and the code that wrote it")
REFUSED = [
    Refusal(
        "all broken", lambda run: broken(run, 4, 6, 7), ("no checkpoint under", "step-000000004", "begin a new run")
    ),
    Refusal("another width", lambda run: None, (*FIT, "0.weight"), lambda: {"model": mlp(width=16)}),
    Refusal("a layer more", lambda run: None, (*FIT, "5."), lambda: {"model": nn.Sequential(*mlp(), nn.Linear(4, 4))}),
    Refusal("a layer less", lambda run: None, (*FIT, "4."), lambda: {"model": nn.Sequential(*list(mlp())[:3])}),
    Refusal("another optimizer", lambda run: None, FIT, lambda: {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}),
    Refusal("another seed", lambda run: None, ("seed 0", "1 now"), lambda: {"sections": {"run": {"seed": 1}}}),
    Refusal("more data", lambda run: None, ("dataset_size 256", "257 now"), lambda: {"dataset": blobs(257)}),
    Refusal("less data", lambda run: None, ("dataset_size 256", "200 now"), lambda: {"dataset": blobs(200)}),
    Refusal("no controller", without("controller"), ("another version", "controller")),
    Refusal("no generator", without("rng"), ("another version", "rng")),
    Refusal(
        "a controller of another version",
        lambda run: reseal(newest(run), lambda meta: meta | {"controller": '{"type": "Brain2"}'}),
        ("another version",),
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_checkpoint_that_does_not_belong_is_refused_and_left_as_it_is(run: Path, case: Refusal) -> None:
    case.damage(run)
    before = {p: p.read_bytes() for p in (run / "run" / "checkpoints").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError) as caught:
        trained(run, resume=True, **case.more())
    for words in case.told:
        assert words in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert {p: p.read_bytes() for p in (run / "run" / "checkpoints").rglob("*") if p.is_file()} == before


def test_a_run_that_lost_all_its_checkpoints_begins_again_and_says_so(run: Path, whole: list[tuple[Any, ...]]) -> None:
    shutil.rmtree(run / "run" / "checkpoints")
    trained(run, resume=True)
    assert [(e["attempt"], e["step"]) for e in events(run, "started")] == [(1, 0), (2, 0)]
    assert rows_of(run, "step", "samples_seen", "loss", "grad_sq", "trace_cov", "noise_scale") == whole


# The run's files


def append(name: str, data: bytes) -> Damage:
    def damage(run: Path) -> None:
        with (run / "run" / name).open("ab") as file:
            file.write(data)

    return damage


def in_the_middle(name: str, data: bytes) -> Damage:
    def damage(run: Path) -> None:
        lines = (run / "run" / name).read_bytes().splitlines(keepends=True)
        (run / "run" / name).write_bytes(b"".join([lines[0], data, *lines[1:]]))

    return damage


FILES_MENDED: list[tuple[str, Damage]] = [
    ("metrics torn", append(folder.METRICS, b'{"attempt": 1, "step": 7, "lo')),
    ("metrics end in zeros", append(folder.METRICS, bytes(100))),
    ("metrics end in half a character", append(folder.METRICS, b'{"attempt": 1, "note": "\xe2\x82')),
    ("events torn", append(folder.EVENTS, b'{"attempt": 1, "kind": "che')),
    ("both torn", lambda run: [append(n, b'{"a')(run) for n in (folder.METRICS, folder.EVENTS)]),
    ("metrics missing", lambda run: (run / "run" / folder.METRICS).unlink()),
    ("config unreadable", lambda run: (run / "run" / folder.CONFIG).write_bytes(b"\xff: [")),
    ("a stop that was asked for and never seen", lambda run: (run / "run" / folder.STOP_REQUEST).touch()),
    ("tensorboard missing", lambda run: shutil.rmtree(run / "run" / "tensorboard")),
]


@pytest.mark.parametrize("damage", [c[1] for c in FILES_MENDED], ids=[c[0] for c in FILES_MENDED])
def test_files_that_a_crash_left_torn_or_lost_do_not_stop_a_run_from_going_on(
    run: Path, whole: list[tuple[Any, ...]], damage: Damage
) -> None:
    had_metrics = bool(rows_of(run, "step"))
    damage(run)
    trained(run, resume=True)
    assert had_metrics
    rows = rows_of(run, "step", "samples_seen", "loss", "grad_sq", "trace_cov", "noise_scale")
    assert rows == whole[-len(rows) :]
    assert len(rows) in (3, 10)  # the last three where the others were lost
    assert_readable(run)


FILES_REFUSED: list[tuple[str, Damage, str]] = [
    ("events hold a line of garbage", in_the_middle(folder.EVENTS, b"garbage\n"), "line 2 is not JSON"),
    ("events hold bytes", in_the_middle(folder.EVENTS, b"\xff\xfe\xff\n"), "line 2"),
    ("events hold a number", in_the_middle(folder.EVENTS, b"42\n"), "line 2"),
    ("events hold another's line", in_the_middle(folder.EVENTS, b'{"level": "info"}\n'), "line 2"),
    ("config missing", lambda run: (run / "run" / folder.CONFIG).unlink(), "no config.yaml"),
]


@pytest.mark.parametrize(("damage", "told"), [c[1:] for c in FILES_REFUSED], ids=[c[0] for c in FILES_REFUSED])
def test_files_that_something_else_changed_are_refused(run: Path, damage: Damage, told: str) -> None:
    damage(run)
    with pytest.raises(RunFolderError, match=told):
        trained(run, resume=True)
    assert saved_steps(run) == [4, 6, 7]


@pytest.mark.parametrize("data", [b"garbage\n", b"\xff\xfe\xff\n", b"42\n", b'{"level": "info"}\n'])
def test_a_reader_of_metrics_that_something_else_changed_is_told_the_line(run: Path, data: bytes) -> None:
    in_the_middle(folder.METRICS, data)(run)
    with pytest.raises(RunFolderError, match="line 2"):
        rows_of(run, "step")


@pytest.mark.parametrize("data", [b"garbage\n", b"\xff\xfe\xff\n", b'{"level": "info"}\n'])
@pytest.mark.parametrize("name", [folder.METRICS, folder.EVENTS])
def test_the_command_shows_no_traceback_of_files_that_something_else_changed(
    tmp_path: Path, name: str, data: bytes
) -> None:
    settings = settings_of(tmp_path, "loss is NaN")
    assert groundswell(settings).exit_code == 1
    in_the_middle(name, data)(tmp_path)
    result = groundswell(settings, "--set", "task.options.kind=sound", "--resume")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    assert "line 2" in result.output


# Storage


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    settings = settings_of(tmp_path / "file" / below)
    with pytest.raises(RunFolderError, match="cannot make the run's folder"):
        train(settings, local_worker(settings), resume=False)
    other = settings_of(tmp_path / "given")
    result = groundswell(other, "--run-dir", str(tmp_path / "file" / below))
    assert result.exit_code != 0
    assert "choose another with --run-dir" in result.output


def test_a_resolved_config_that_cannot_be_written_is_a_clear_error(run: Path) -> None:
    (run / "run" / folder.CONFIG).unlink()
    (run / "run" / folder.CONFIG).mkdir()
    with pytest.raises((StorageError, RunFolderError), match=folder.CONFIG):
        trained(run, resume=True)


def limited(limit: int | None, function: Callable[[], Any]) -> Any:
    """``function`` with no file growing beyond ``limit`` bytes: the writes really fail."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if limit is None else limit, hard))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


def wide(path: str, steps: int, full_from: int, mended_from: int, limit: int) -> bool:
    """A run whose checkpoints take a megabyte, on storage that is full from one step to another."""
    sections: dict[str, Any] = {
        "train": {"samples": steps * BATCH},
        "checkpoint": {"every_samples": 2 * BATCH, "keep": 2},
        "ledger": True,
    }
    model = mlp(width=300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Session(config(path, **sections), model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            full = full_from <= session.step_number < mended_from
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if full else resource.RLIM_INFINITY, hard))
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    return session.finished


def member(rank: int, function: Callable[..., Any], *args: Any) -> Any:
    """For a child process: what ``function`` returns, or its error's kind and words."""
    try:
        return function(*args)
    except GroundswellError as error:
        return type(error).__name__, str(error)


ROOM = 200_000  # bytes: enough for every file but the tensors


def test_a_full_disk_costs_checkpoints_and_no_training_and_the_older_ones_stay(tmp_path: Path) -> None:
    # Saves after steps 1, 3, 5, 7; those of 3 and 5 fail.
    assert run_fleet(member, 1, wide, str(tmp_path), 9, 3, 6, ROOM) == [True]
    failed = events(tmp_path, "checkpoint_failed")
    assert [e["step"] for e in failed] == [4, 6]
    assert all("older checkpoints are untouched" in e["reason"] and "Errno 27" in e["reason"] for e in failed)
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [2, 8, 9]
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(9))
    assert_readable(tmp_path)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if "partial" in p.name] == []


def test_when_the_last_checkpoint_fails_on_a_full_disk_the_run_fails_and_the_older_one_can_be_resumed(
    tmp_path: Path,
) -> None:
    ((kind, told),) = run_fleet(member, 1, wide, str(tmp_path), 7, 3, 100, ROOM)
    assert kind == "CheckpointError"
    assert "checkpoint of step 7 was not written" in told
    assert saved_steps(tmp_path) == [2]
    assert events(tmp_path, "finished") == []
    assert events(tmp_path, "fault")
    assert_readable(tmp_path)
    trained(tmp_path, resume=True, model=mlp(width=300), sections={"train": {"samples": 7 * BATCH}, "ledger": True})
    assert [e["step"] for e in events(tmp_path, "resumed", "finished")] == [2, 7]
    assert_readable(tmp_path)


def command_on_full_disk(path: str, limit: int) -> tuple[int, str]:
    KINDS["wide"] = model_of(lambda: mlp(width=300))
    settings = settings_of(Path(path), "wide", checkpoint={"every_samples": BATCH})
    result: Result = limited(limit, lambda: groundswell(settings))
    return result.exit_code, result.output


def test_the_command_ends_with_an_error_when_the_last_checkpoint_was_not_written(tmp_path: Path) -> None:
    ((exit_code, output),) = run_fleet(member, 1, command_on_full_disk, str(tmp_path), ROOM)
    assert exit_code == 1
    assert f"checkpoint of step {STEPS} was not written" in output
    assert "Traceback" not in output
    assert [step for (step,) in rows_of(tmp_path, "step")] == list(range(STEPS))
    assert_readable(tmp_path)


def test_a_disk_too_full_for_a_line_of_metrics_is_a_storage_error_that_names_the_file(tmp_path: Path) -> None:
    # Room for the resolved config and some lines.
    ((kind, told),) = run_fleet(member, 1, wide, str(tmp_path), 40, 0, 100, 5_000)
    assert kind == "StorageError"
    assert folder.METRICS in told or folder.EVENTS in told
    assert "then resume the run" in told
    list(folder.rows(tmp_path / "run" / folder.METRICS))  # the torn last line is left out
    trained(tmp_path, resume=True, model=mlp(width=300), sections={"train": {"samples": 40 * BATCH}, "ledger": True})
    assert_readable(tmp_path)


# The tables are as long as promised


def test_the_tables_hold_at_least_forty_broken_tasks_and_checkpoints() -> None:
    checkpoints, files = len(RECOVERED) + len(REFUSED), len(FILES_MENDED) + len(FILES_REFUSED)
    print(f"{len(TASKS)} tasks, {checkpoints} checkpoints, {files} run files")
    assert len(TASKS) + checkpoints >= 40
