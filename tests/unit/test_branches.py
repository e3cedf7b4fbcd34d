"""Branches in a session: the trunk goes on as if there had been none, and they lose what trial runs of their own would.

What is made of their losses is tested in ``test_branching``.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.core.cursor import Stream
from orchestrator.runtime import branches, folder, ledger, replay
from orchestrator.session import Session
from tests.support import EAGER, blobs, config, cross_entropy, mlp

EVERY, EACH = 256, 256  # samples
BRANCHED: dict[str, Any] = {
    **EAGER,
    "policy": "branched",
    "branch_every_samples": EVERY,
    "branch_samples": EACH,
    "branch_tolerance": 0.05,
}


def branched(path: Path, *, mode: str = "act", **sections: Any) -> RunConfig:
    sections.setdefault("train", {"samples": 800})
    batch = {"initial": 16, "micro_batch": 8, "max": 128}
    return config(path, batch=batch, controller={**BRANCHED, "mode": mode}, ledger=True, **sections)


def model_with_state() -> nn.Module:
    """Dropout draws, and running means change, in every forward pass; leaves the generators seeded."""
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Tanh(), nn.Linear(32, 4))


def trained(
    settings: RunConfig, model: nn.Module, *, lr: float = 0.01, resume: bool = False, stop_in_step: int | None = None
) -> Session:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs(), resume=resume) as session:
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: cross_entropy(session.model, samples))
            torch.rand(3), random.random(), np.random.random()  # the loop's own draws
            if session.step_number == stop_in_step and not session.on_branch:
                session.request_stop("the test asked")
            session.step()
    return session


def rounds(path: Path) -> list[dict[str, Any]]:
    return [row for row in folder.rows(path / "run" / folder.EVENTS) if row["kind"] == "branches"]


def lines(path: Path) -> list[dict[str, Any]]:
    keys = ("step", "samples_seen", "loss", "lr", "global_batch", "micro_batch", "grad_sq", "trace_cov")
    return [{key: row[key] for key in keys} for row in folder.surviving(path / "run" / folder.METRICS)]


def everything(model: nn.Module) -> list[Tensor]:
    own = torch.tensor([random.getstate()[1][:3], np.random.get_state()[1][:3].tolist()])
    return [*model.parameters(), *model.buffers(), torch.get_rng_state(), own]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_run_that_only_looks_is_bit_for_bit_the_one_without_branches(tmp_path: Path) -> None:
    plain = config(tmp_path / "plain", batch={"initial": 16, "micro_batch": 8}, train={"samples": 800})
    without = model_with_state()
    trained(plain, without)
    expected = [t.clone() for t in everything(without)]
    model = model_with_state()
    trained(branched(tmp_path / "branched", mode="advise"), model)
    assert len(rounds(tmp_path / "branched")) == 2
    assert_same(everything(model), expected)
    assert lines(tmp_path / "branched") == lines(tmp_path / "plain")
    assert ledger.verify(tmp_path / "branched" / "run").violation is None


def test_a_branch_loses_what_a_trial_from_the_same_state_loses(tmp_path: Path) -> None:
    trained(branched(tmp_path, mode="advise", lr_rule={"name": "sqrt"}), mlp(), lr=0.01)
    found = dict(rounds(tmp_path)[1]["losses"])
    data, order = blobs(), Stream(size=256, seed=0)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, begin: int, end: int) -> list[float]:
        losses = []
        for position in range(begin, end, batch):
            samples = data[torch.from_numpy(order.indices(range(position, position + batch)))]
            loss = cross_entropy(model, samples)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert list(found) == [16, 32, 64]
    for batch, loss in found.items():
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        plain(model, optimizer, 16, 0, 2 * EVERY)
        optimizer.param_groups[0]["lr"] = 0.01 * math.sqrt(batch / 16)
        second_half = plain(model, optimizer, batch, 2 * EVERY, 2 * EVERY + EACH)[EACH // batch // 2 :]
        assert loss == pytest.approx(sum(second_half) / len(second_half), rel=1e-5)


def test_the_policy_follows_what_the_branches_found_and_a_replay_does_too(tmp_path: Path) -> None:
    trained(branched(tmp_path), mlp(), lr=0.003)
    decisions = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "decision"]
    first = rounds(tmp_path)[0]["samples_seen"]
    assert all(row["target_batch"] == 16 for row in decisions if row["samples_seen"] <= first)
    assert max(row["target_batch"] for row in decisions) > 16
    assert replay.recomputed(tmp_path / "run") == replay.recorded(tmp_path / "run")


@pytest.mark.parametrize("stop", [EVERY // 16 - 2, EVERY // 16 - 1, EVERY // 16])
def test_a_stop_around_a_round_changes_nothing(tmp_path: Path, stop: int) -> None:
    whole = model_with_state()
    trained(branched(tmp_path / "whole"), whole)
    expected = [t.clone() for t in everything(whole)]
    first = trained(branched(tmp_path / "parts"), model_with_state(), stop_in_step=stop)
    assert not first.finished
    model = model_with_state()
    trained(branched(tmp_path / "parts"), model, resume=True)
    assert_same(everything(model), expected)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    causes = [[row["cause"] for row in rounds(path)] for path in (tmp_path / "whole", tmp_path / "parts")]
    assert causes[0] == causes[1]


def assert_checkpoints_as_due(tmp_path: Path) -> None:
    at = [
        [row["step"] for row in folder.rows(tmp_path / name / "run" / folder.EVENTS) if row["kind"] == "checkpoint"]
        for name in ("plain", "branched")
    ]
    assert at[0] == at[1]


class Fragile(nn.Module):
    """Breaks in a forward pass that ``breaks`` says something about."""

    def __init__(self, session: list[Session], how: str) -> None:
        super().__init__()
        self.inner, self.session, self.how = mlp(), session, how

    def forward(self, inputs: Tensor) -> Tensor:
        session = self.session[0]
        if session.on_branch and session.plan.batch == 32:
            if self.how == "memory":
                raise torch.OutOfMemoryError("planted")
            return self.inner(inputs) * math.inf
        return self.inner(inputs)


@pytest.mark.parametrize("how", ["memory", "diverges"])
def test_a_branch_that_breaks_does_not_break_the_run(tmp_path: Path, how: str) -> None:
    plain = mlp()
    often = {"every_samples": EVERY}
    sections = {"batch": {"initial": 16, "micro_batch": 8}, "train": {"samples": 640}, "checkpoint": often}
    trained(config(tmp_path / "plain", **sections), plain)
    holder: list[Session] = []
    model = Fragile(holder, how)
    settings = branched(tmp_path / "branched", mode="advise", train={"samples": 640}, checkpoint=often)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        holder.append(session)
        for step in session:
            for samples in step:
                session.backward(lambda samples=samples: cross_entropy(session.model, samples))
            session.step()
    assert session.finished
    assert_same(list(model.parameters()), list(plain.parameters()))
    assert_checkpoints_as_due(tmp_path)
    found = [row["losses"] for row in rounds(tmp_path / "branched")]
    if how == "memory":
        assert found == []
    else:
        assert [loss is None for _, loss in found[0]] == [False, True, False]


def test_averaged_weights_ramps_and_rescaled_squares_are_the_trunks_own(tmp_path: Path) -> None:
    settled: dict[str, Any] = {
        "lr_rule": {"name": "sqrt", "ramp_samples": 64, "second_moment": "rescale"},
        "train": {"samples": 800, "ema_half_life_samples": 128},
        "optimizer": {"name": "adamw", "lr": 0.01, "momentum": None},
    }
    plain = config(tmp_path / "plain", batch={"initial": 16, "micro_batch": 8}, **settled)
    averages = []
    for settings in (plain, branched(tmp_path / "branched", mode="advise", **settled)):
        model = model_with_state()
        session = trained(settings, model)
        with session.ema_weights():
            averages.append([p.detach().clone() for p in model.parameters()])
        averages[-1] += [p.detach() for p in model.parameters()]
    assert_same(*averages)


def test_the_advice_of_a_run_that_only_branches_follows_what_they_found(tmp_path: Path) -> None:
    trained(branched(tmp_path, mode="advise"), mlp(), lr=0.003)
    advice = next(row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "advice")
    assert advice["schedule"]
    assert advice["schedule"][0][0] >= EVERY


def test_branches_have_the_rate_that_the_rule_gives_with_the_noise_scale_of_the_moment(tmp_path: Path) -> None:
    settings = branched(tmp_path, mode="advise", train={"samples": 640}, lr_rule={"name": "noise_scale"})
    model, rates = mlp(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            if session.on_branch:
                rates.setdefault(session.plan.batch, optimizer.param_groups[0]["lr"])
    began = rounds(tmp_path)[0]["samples_seen"]
    line = next(row for row in folder.surviving(tmp_path / "run" / folder.METRICS) if row["samples_seen"] == began)
    scale = line["noise_scale"]
    assert sorted(rates) == [16, 32, 64]
    for batch, rate in rates.items():
        assert rate == pytest.approx(0.01 * (1 + scale / 16) / (1 + scale / batch), rel=1e-9)


def test_without_a_noise_scale_a_round_waits_and_says_so_once(tmp_path: Path) -> None:
    settings = branched(tmp_path, mode="advise", train={"samples": 640}, measure={"every_steps": 1000})
    trained(settings, mlp())
    said = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "branches_put_off"]
    assert len(said) == 1
    assert "until the noise scale is known" in said[0]["reason"]
    assert rounds(tmp_path) == []


@pytest.mark.parametrize("asked", ["request_stop", "the folder"])
def test_a_stop_is_heard_on_a_branch_and_the_round_comes_again(tmp_path: Path, asked: str) -> None:
    settings = branched(tmp_path, mode="advise")
    model, on_branch = mlp(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Session(settings, model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            on_branch += session.on_branch
            if on_branch == 2 and asked == "request_stop":
                session.request_stop("the test asked")
            elif on_branch == 2:
                (tmp_path / "run" / folder.STOP_REQUEST).touch()
            session.step()
    assert not session.finished
    assert on_branch == 2
    assert rounds(tmp_path) == []
    stopped = session.samples_seen
    trained(settings, mlp(), resume=True)
    assert rounds(tmp_path)[0]["samples_seen"] == stopped


def test_a_loop_that_is_left_on_a_branch_leaves_the_trunks_weights(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Session(branched(tmp_path), model=model, optimizer=optimizer, dataset=blobs()) as session:
        for step in session:
            for samples in step:
                session.backward(cross_entropy(session.model, samples))
            session.step()
            if not session.on_branch:
                trunk = [p.detach().clone() for p in model.parameters()]
            elif session.plan.batch == 32:
                break
    assert_same(list(model.parameters()), trunk)


def test_a_round_whose_state_finds_no_room_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(branches, "Kept", no_room)
    session = trained(branched(tmp_path, mode="advise", train={"samples": 640}), mlp())
    assert session.finished
    said = [row for row in folder.rows(tmp_path / "run" / folder.EVENTS) if row["kind"] == "branches_put_off"]
    assert "memory does not suffice" in said[-1]["reason"]
    assert rounds(tmp_path) == []
