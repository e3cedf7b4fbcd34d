"""The session's calls: what their misuse says, and that a run which stops goes on as if it had not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from orchestrator.config import RunConfig
from orchestrator.errors import RunFolderError, SessionError
from orchestrator.ports import Brain, Commands
from orchestrator.runtime import folder, ledger
from orchestrator.runtime.brain import LocalBrain
from orchestrator.runtime.collective import Solo
from orchestrator.runtime.worker import Worker
from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp

Rows = list[dict[str, Any]]


def session_of(settings: RunConfig, *, model: nn.Module | None = None, **more: Any) -> Session:
    model = mlp() if model is None else model
    optimizer = more.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Session(settings, model=model, optimizer=optimizer, **({"dataset": blobs()} | more))


def run(session: Session, *, stop_in_step: int | None = None) -> Session:
    """The loop that a user writes; a stop is asked for while ``stop_in_step`` is under way."""
    with session:
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: cross_entropy(session.model, samples))
            if session.step_number == stop_in_step:
                session.request_stop("the test asked")
            session.step()
    return session


def metrics(path: Path, *keys: str) -> Rows:
    return [{key: row[key] for key in keys} for row in folder.surviving(path / "run" / folder.METRICS)]


def events(path: Path, *kinds: str) -> Rows:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] in kinds]


def weights(session: Session) -> list[Tensor]:
    model = session.model
    return [p.detach().clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


# Misuse


def forgets_backward(session: Session) -> None:
    for step in session:
        for _ in step:
            pass
        session.step()


def forgets_the_last_backward(session: Session) -> None:
    for step in session:
        for number, samples in enumerate(step):
            if number < 3:
                session.backward(cross_entropy(session.model, samples))
        session.step()


def backward_twice(session: Session) -> None:
    for step in session:
        for samples in step:
            session.backward(cross_entropy(session.model, samples))
            session.backward(cross_entropy(session.model, samples))


def forgets_step(session: Session) -> None:
    for step in session:
        for samples in step:
            session.backward(cross_entropy(session.model, samples))


def steps_twice(session: Session) -> None:
    for step in session:
        for samples in step:
            session.backward(cross_entropy(session.model, samples))
        session.step()
        session.step()


def breaks_out_of_a_step(session: Session) -> None:
    for step in session:
        for samples in step:
            session.backward(cross_entropy(session.model, samples))
            break
        session.step()


def never_looks_into_a_step(session: Session) -> None:
    for _ in session:
        session.step()


def backward_before_the_loop(session: Session) -> None:
    session.backward(cross_entropy(session.model, (torch.zeros(8, 20), torch.zeros(8, dtype=torch.long))))


def steps_before_the_loop(session: Session) -> None:
    session.step()


def with_loss(change: Callable[[Tensor], Any]) -> Callable[[Session], None]:
    def loop(session: Session) -> None:
        for step in session:
            for samples in step:
                session.backward(
                    change(nn.functional.cross_entropy(session.model(samples[0]), samples[1], reduction="none"))
                )
            session.step()

    return loop


MISUSE: list[tuple[str, Callable[[Session], None], str]] = [
    ("backward() forgotten", forgets_backward, "call session.backward() once for each"),
    ("the last backward() forgotten", forgets_the_last_backward, "call session.backward() once for each"),
    ("backward() twice", backward_twice, "once for each"),
    ("step() forgotten", forgets_step, "step 0 was not finished: call session.step()"),
    ("step() twice", steps_twice, "step()"),
    ("a break inside a step", breaks_out_of_a_step, "step 0: 1 of 4 micro-batches"),
    ("the step's micro-batches not taken", never_looks_into_a_step, "step 0: 0 of 4 micro-batches"),
    ("backward() before the loop", backward_before_the_loop, "inside the loop"),
    ("step() before the loop", steps_before_the_loop, "step()"),
    ("a loss per sample", with_loss(lambda losses: losses), "the loss has shape (8,)"),
    ("a loss of one element in a row", with_loss(lambda losses: losses.mean().view(1)), "the loss has shape (1,)"),
    ("a loss as a number", with_loss(lambda losses: losses.mean().item()), "loss"),
    ("a loss without a gradient", with_loss(lambda losses: losses.mean().detach()), "loss"),
    ("no loss", with_loss(lambda losses: None), "loss"),
]


@pytest.mark.parametrize(("loop", "told"), [case[1:] for case in MISUSE], ids=[case[0] for case in MISUSE])
def test_misuse_is_a_session_error_that_names_the_call_and_is_written_down(
    tmp_path: Path, loop: Callable[[Session], None], told: str
) -> None:
    settings = config(tmp_path, ledger=True)
    with pytest.raises(SessionError) as caught, session_of(settings) as session:
        loop(session)
    assert told in str(caught.value)
    (fault,) = events(tmp_path, "fault")
    assert str(caught.value) in fault["reason"]
    # No step was counted that was not trained.
    if (tmp_path / "run" / folder.LEDGER).exists():
        assert ledger.verify(tmp_path / "run").violation is None


def test_a_misused_step_leaves_the_generators_as_found(tmp_path: Path) -> None:
    session = session_of(config(tmp_path))
    torch.manual_seed(11)
    found = torch.get_rng_state()
    steps: Iterator[Any] = iter(session)
    with pytest.raises(SessionError), session:
        for _ in next(steps):
            pass
    assert torch.equal(torch.get_rng_state(), found)


# The folder


def test_a_folder_that_holds_a_run_is_refused_without_resume_and_left_alone(tmp_path: Path) -> None:
    run(session_of(config(tmp_path)))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError, match="already holds a run; pass --resume"):
        session_of(config(tmp_path))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resuming_where_no_run_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run to resume"):
        session_of(config(tmp_path), resume=True)
    assert list(tmp_path.iterdir()) == []


# Resuming


def growing(path: Path) -> RunConfig:
    """A run whose batch the measured noise scale grows, several times; low confidence, so that it decides early."""
    return config(
        path,
        train={"samples": 2048},
        batch={"initial": 8, "micro_batch": 4, "max": 128},
        schedule={"name": "cosine", "warmup_samples": 300},
        controller={**EAGER, "lag_steps": 2},
        ledger=True,
    )


class CountsSamples(nn.Module):
    """A layer with a state of its own, as a normalisation layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("samples", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        self.samples += len(inputs)
        return inputs


def with_dropout() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(CountsSamples(), nn.Linear(20, 32), nn.Dropout(0.2), nn.Tanh(), nn.Linear(32, 4))


def trained(path: Path, *, resume: bool = False, stop_in_step: int | None = None) -> Session:
    model = with_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.004, momentum=0.5)
    return run(session_of(growing(path), model=model, optimizer=optimizer, resume=resume), stop_in_step=stop_in_step)


EXACT = ("step", "samples_seen", "epoch", "loss", "lr", "global_batch", "micro_batch", "accum_steps", "grad_sq")
NOISE = ("trace_cov", "noise_scale", "noise_low", "noise_high", "verdict")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    path = tmp_path_factory.mktemp("uninterrupted")
    session = trained(path)
    assert session.finished
    batches = {row["global_batch"] for row in metrics(path, "global_batch")}
    assert len(batches) >= 3, f"the run that others are compared with must change its batch, and had {batches}"
    return path, weights(session)


def decided(path: Path) -> list[tuple[Any, ...]]:
    return [(e["step"], e["samples_seen"], e["target_batch"], e["reason"]) for e in events(path, "decision")]


def last_growth(path: Path) -> dict[str, Any]:
    return [e for e in events(path, "decision") if e.get("effective_step") is not None][-1]


@pytest.mark.parametrize("where", ["early", "decided", "announced", "in effect", "last step"])
def test_a_run_that_stops_and_goes_on_is_bit_for_bit_the_one_that_did_not(
    tmp_path: Path, uninterrupted: tuple[Path, list[Tensor]], where: str
) -> None:
    reference, reference_weights = uninterrupted
    growth = last_growth(reference)
    last = metrics(reference, "step")[-1]["step"]
    stop = {
        "early": 1,
        "decided": growth["step"],
        "announced": growth["effective_step"] - 1,
        "in effect": growth["effective_step"],
        "last step": last - 1,
    }[where]
    first = trained(tmp_path, stop_in_step=stop)
    assert not first.finished
    torch.manual_seed(99)  # whatever the process drew before it resumed
    second = trained(tmp_path, resume=True)
    assert second.finished
    assert metrics(tmp_path, *EXACT, *NOISE) == metrics(reference, *EXACT, *NOISE)
    assert_equal(weights(second), reference_weights)
    assert ledger.verify(tmp_path / "run").violation is None
    assert [e["step"] for e in events(tmp_path, "stopped", "resumed")] == [stop + 1, stop + 1]
    # None is lost that was taken, and not announced yet, when the run stopped.
    assert decided(tmp_path) == decided(reference)


def test_stopping_again_and_again_changes_nothing(tmp_path: Path, uninterrupted: tuple[Path, list[Tensor]]) -> None:
    reference, reference_weights = uninterrupted
    session = trained(tmp_path, stop_in_step=40)
    while not session.finished:
        stop = session.step_number + 40
        session = trained(tmp_path, resume=True, stop_in_step=stop)
    assert metrics(tmp_path, *EXACT, *NOISE) == metrics(reference, *EXACT, *NOISE)
    assert_equal(weights(session), reference_weights)


def test_a_finished_run_that_is_resumed_trains_nothing_and_is_finished(tmp_path: Path) -> None:
    before = weights(run(session_of(config(tmp_path))))
    rows = metrics(tmp_path, *EXACT)
    again = run(session_of(config(tmp_path), resume=True))
    assert again.finished
    assert_equal(weights(again), before)
    assert metrics(tmp_path, *EXACT) == rows


def test_the_callers_generator_goes_on_where_the_checkpoint_left_it(tmp_path: Path) -> None:
    def drawing(path: Path, *, resume: bool = False, stop_in_step: int | None = None) -> list[float]:
        draws = []
        with session_of(config(path), resume=resume) as session:
            for step in session:
                draws.append(float(torch.rand(())))  # outside the micro-batches: the loop's own randomness
                for samples in step:
                    session.backward(cross_entropy(session.model, samples))
                if session.step_number == stop_in_step:
                    session.request_stop("the test asked")
                session.step()
        return draws

    torch.manual_seed(5)
    whole = drawing(tmp_path / "whole")
    torch.manual_seed(5)
    first = drawing(tmp_path / "parts", stop_in_step=7)
    torch.manual_seed(77)
    assert first + drawing(tmp_path / "parts", resume=True) == whole


def leave_a_loop_half_way(path: Path) -> None:
    """As an error in a notebook does: the iterators wait in a reference cycle for the garbage collector."""
    session = session_of(config(path))
    steps = iter(session)
    micro_batches = next(steps)
    next(micro_batches)
    session.kept = (session, steps, micro_batches)  # type: ignore[attr-defined]


def test_a_loop_that_was_left_half_way_never_touches_the_generators_again(tmp_path: Path) -> None:
    gc.collect()
    leave_a_loop_half_way(tmp_path)
    torch.manual_seed(3)
    expected = torch.default_generator.get_state()
    assert gc.collect() > 0
    assert torch.equal(torch.default_generator.get_state(), expected)


@pytest.mark.parametrize("exhausted", [True, False])
def test_the_generators_are_the_callers_again_after_a_step(tmp_path: Path, exhausted: bool) -> None:
    settings = config(tmp_path, batch={"initial": 4, "micro_batch": 4})
    with session_of(settings) as session:
        steps = iter(session)
        micro_batches = next(steps)
        torch.manual_seed(3)
        expected = torch.default_generator.get_state()
        session.backward(cross_entropy(session.model, next(micro_batches)))
        assert not torch.equal(torch.default_generator.get_state(), expected)
        if exhausted:
            assert list(micro_batches) == []
        session.step()
        assert torch.equal(torch.default_generator.get_state(), expected)


# Evaluation, stopping, learning rates


def test_evaluation_is_due_in_samples_and_at_the_end(tmp_path: Path) -> None:
    due = []
    settings = config(tmp_path, train={"samples": 330}, evaluation={"every_samples": 100})
    with session_of(settings) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            if session.evaluation_due:
                due.append(session.samples_seen)
                session.record_evaluation({"accuracy": 0.5, "odd": float("nan")})
    assert due == [128, 224, 320, 330]  # steps of 32: the first after each multiple of 100
    rows = list(folder.rows(tmp_path / "run" / folder.EVALS))
    assert [row["samples_seen"] for row in rows] == due
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    assert all(row["accuracy"] == 0.5 and row["odd"] is None for row in rows)


@pytest.mark.parametrize(("stop_at", "expected"), [(3, [64]), (4, [64, 128])])
def test_no_evaluation_takes_the_time_of_a_stop_that_was_heard_but_the_last(
    tmp_path: Path, stop_at: int, expected: list[int]
) -> None:
    due, curved = [], []
    settings = config(
        tmp_path,
        train={"samples": 128},
        evaluation={"every_samples": 32},
        measure={"curvature_every_samples": 32},
        checkpoint={"every_samples": 32},
    )
    with session_of(settings) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            if session.step_number == stop_at - 1:
                session.request_stop("enough")
            session.step()
            if session.evaluation_due and session.step_number % 2 == 0:
                due.append(session.samples_seen)
            if session.curvature_due:
                curved.append(session.samples_seen)
    assert session.step_number == stop_at
    assert due == expected  # the run's last belongs to its end
    assert curved == [32, 64, 96][: stop_at - 1]


def test_a_stop_file_stops_after_the_step_at_hand_with_a_checkpoint_and_is_gone_after(tmp_path: Path) -> None:
    request = tmp_path / "run" / folder.STOP_REQUEST
    with session_of(config(tmp_path)) as session:
        for step in session:
            if session.step_number == 4:
                request.touch()
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
    assert (session.step_number, session.finished) == (5, False)
    assert not request.exists()
    assert (tmp_path / "run" / "checkpoints" / "step-000000005").is_dir()
    assert run(session_of(config(tmp_path), resume=True)).finished


def test_a_stop_asked_for_after_the_step_is_kept_for_the_next(tmp_path: Path) -> None:
    with session_of(config(tmp_path)) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            if session.step_number == 3:
                session.request_stop("enough")
    assert session.step_number == 4
    (stopped,) = events(tmp_path, "stopped")
    assert stopped["reason"] == "enough"


def test_every_parameter_group_keeps_its_own_rate_times_the_same_factor(tmp_path: Path) -> None:
    model = mlp()
    layers = [[*model[0].parameters()], [*model[2].parameters()], [*model[4].parameters()]]  # type: ignore[index]
    groups: list[dict[str, Any]] = [{"params": p, "lr": lr} for p, lr in zip(layers, (0.1, 0.01, 0.0), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    settings = config(
        tmp_path,
        schedule={"name": "linear"},
        lr_rule={"name": "sqrt"},
        batch={"initial": 16, "micro_batch": 8, "max": 64},
        controller={
            "policy": "schedule",
            "ramp": [[128, 64]],
            "every_samples": 128,
            "max_growth": 4.0,
            "deadband": 1.0,
        },
    )
    frozen = model[4].weight.detach().clone()  # type: ignore[index,union-attr]
    seen = []
    with session_of(settings, model=model, optimizer=optimizer) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            before, factor = session.samples_seen, session.lr_factor
            assert factor == pytest.approx((1 - before / 640) * (session.plan.batch / 16) ** 0.5, rel=1e-12)
            session.step()
            seen.append(session.plan.batch)
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == [0.1 * factor, 0.01 * factor, 0.0]
    assert {16, 64} <= set(seen)
    assert torch.equal(model[4].weight, frozen)  # type: ignore[index,arg-type]
    assert metrics(tmp_path, "lr")[0] == {"lr": 0.1}


def test_resuming_does_not_multiply_the_rates_again(tmp_path: Path) -> None:
    def settings(path: Path) -> RunConfig:
        return config(path, schedule={"name": "cosine"})

    run(session_of(settings(tmp_path / "whole")))
    run(session_of(settings(tmp_path / "parts")), stop_in_step=9)
    run(session_of(settings(tmp_path / "parts"), resume=True))
    assert metrics(tmp_path / "parts", "step", "lr") == metrics(tmp_path / "whole", "step", "lr")


@pytest.mark.parametrize("every", [2, 3])
def test_only_every_nth_step_is_measured_and_training_is_the_same(tmp_path: Path, every: int) -> None:
    always = weights(run(session_of(config(tmp_path / "always"))))
    seldom = weights(run(session_of(config(tmp_path / "seldom", measure={"every_steps": every}))))
    assert_equal(seldom, always)
    keys = ("loss", "grad_sq", "trace_cov")
    for n, (mine, theirs) in enumerate(
        zip(metrics(tmp_path / "seldom", *keys), metrics(tmp_path / "always", *keys), strict=True)
    ):
        assert mine == (theirs if n % every == 0 else theirs | {"grad_sq": None, "trace_cov": None})


# What must not leak into the moments


def moments(path: Path) -> list[tuple[float, float, float]]:
    return [(row["loss"], row["grad_sq"], row["trace_cov"]) for row in metrics(path, "loss", "grad_sq", "trace_cov")]


def assert_same_moments(path: Path, other: Path, *, rel: float) -> None:
    for mine, theirs in zip(moments(path), moments(other), strict=True):
        # The moments are differences of sums of this size.
        size = abs(theirs[1]) + abs(theirs[2])
        assert mine[0] == pytest.approx(theirs[0], rel=rel)
        assert mine[1:] == pytest.approx(theirs[1:], abs=rel * size)


@pytest.mark.parametrize("init_scale", [2.0**12, 1000.0])
def test_the_scale_of_a_grad_scaler_does_not_reach_the_moments(tmp_path: Path, init_scale: float) -> None:
    run(session_of(config(tmp_path / "plain")))
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=5)
    run(session_of(config(tmp_path / "scaled"), grad_scaler=scaler))
    assert scaler.get_scale() > init_scale, "the scale changed on the way"
    assert_same_moments(tmp_path / "scaled", tmp_path / "plain", rel=1e-5)


def test_a_step_that_overflows_under_a_grad_scaler_is_skipped_and_training_goes_on(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    model = mlp()
    start = [p.detach().clone() for p in model.parameters()]
    session = session_of(config(tmp_path), model=model, grad_scaler=scaler)
    with session:
        for step in session:
            for samples in step:
                # Finite, but not times the scale.
                factor = 1e30 if session.step_number == 0 else 1.0
                session.backward(factor * cross_entropy(session.model, samples))
            session.step()
            if session.step_number == 1:
                assert_equal([p.detach() for p in model.parameters()], start)
    assert session.finished
    assert scaler.get_scale() == 2.0**39
    rows = metrics(tmp_path, "loss", "grad_sq", "trace_cov")
    assert (rows[0]["grad_sq"], rows[0]["trace_cov"]) == (None, None)
    assert rows[-1]["grad_sq"] is not None


def test_a_grad_scaler_goes_on_from_its_saved_scale(tmp_path: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)

    whole, first, second = scaler(), scaler(), scaler()
    run(session_of(config(tmp_path / "whole"), grad_scaler=whole))
    run(session_of(config(tmp_path / "parts"), grad_scaler=first), stop_in_step=11)
    run(session_of(config(tmp_path / "parts"), grad_scaler=second, resume=True))
    assert second.get_scale() == whole.get_scale()


@pytest.mark.parametrize(
    ("train", "weight_decay"), [({"max_grad_norm": 1e-3}, 0.0), ({}, 10.0), ({"max_grad_norm": 1e-3}, 10.0)]
)
def test_clipping_and_weight_decay_do_not_reach_the_moments(
    tmp_path: Path, train: dict[str, float], weight_decay: float
) -> None:
    # At one point of weight space, so that only what is read could differ.
    def at_rest(path: Path, weight_decay: float, **sections: Any) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-20, weight_decay=weight_decay)
        run(session_of(config(path, **sections), model=model, optimizer=optimizer))

    at_rest(tmp_path / "plain", 0.0)
    at_rest(tmp_path / "other", weight_decay, train={"samples": 640, **train})
    assert moments(tmp_path / "other") == moments(tmp_path / "plain")


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0], ids=["reached", "not reached"])
@pytest.mark.parametrize("amp", [False, True])
def test_a_sparse_gradient_is_clipped_as_the_dense_one_that_it_stands_for(
    tmp_path: Path, max_grad_norm: float, amp: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(12, (256, 5), generator=generator)  # words come twice in a batch, and in a sample
    data = TensorDataset(words, torch.randint(4, (256,), generator=generator))
    found = []
    for sparse in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Embedding(12, 8, sparse=sparse), nn.Flatten(), nn.Linear(40, 4))
        settings = config(tmp_path / str(sparse), train={"samples": 160, "max_grad_norm": max_grad_norm})
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if amp else None
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        run(session_of(settings, model=model, optimizer=optimizer, dataset=data, grad_scaler=scaler))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_clipping_clips_the_sum_and_not_each_micro_batch(tmp_path: Path) -> None:
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run(session_of(config(tmp_path, train={"samples": 32, "max_grad_norm": 0.01}), model=model, optimizer=optimizer))
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


# A step that is done again keeps what was asked in it


class AsksOnce:
    """A controller that asks for a checkpoint when it is first looked at, and never again."""

    def __init__(self, inner: Brain) -> None:
        self._inner = inner
        self._save: str | None = "the cluster asked"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commands(self) -> Commands:
        commands, self._save = Commands(save=self._save), None
        return commands


@pytest.mark.parametrize("most", [8, 4, 2, 1])
def test_a_checkpoint_asked_for_in_a_step_that_runs_out_of_memory_is_written_after_it(
    tmp_path: Path, most: int
) -> None:
    settings = config(tmp_path)
    worker = Worker(
        collective=Solo(), device=torch.device("cpu"), brain=AsksOnce(LocalBrain(settings)), runtime="local"
    )  # type: ignore[arg-type]  # the rest of the port is handed on
    session = session_of(settings, worker=worker)

    def loss(samples: Any) -> Tensor:
        if len(samples[0]) > most:
            raise torch.OutOfMemoryError("planted")
        return cross_entropy(session.model, samples)

    with session:
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: loss(samples))
            session.step()
    assert [(e["step"], e["reason"]) for e in events(tmp_path, "checkpoint")] == [
        (1, "asked for"),
        (20, "the end"),
    ]


def test_gradients_and_state_from_before_do_not_keep_the_saved_state_out(tmp_path: Path) -> None:
    expected = run(session_of(config(tmp_path / "whole")))
    run(session_of(config(tmp_path / "parts")), stop_in_step=7)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cross_entropy(model, blobs()[:8]).backward()
    optimizer.step()  # and the gradients stay
    resumed = run(session_of(config(tmp_path / "parts"), model=model, optimizer=optimizer, resume=True))
    assert_equal(weights(resumed), weights(expected))
