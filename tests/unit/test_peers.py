"""A loop whose group stays asks the same questions as one whose group changes, and hears that nobody is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.runtime.group import lost_peer
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp

GONE = "[gloo/transport/tcp/pair.cc] Connection closed by peer"


def trained(place: Path, *, fails_in: str) -> Session:
    """A run on one process, in whose third step the caller's code fails as an exchange does when a rank is gone."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = Session(config(place), model=model, optimizer=optimizer, dataset=blobs())

    def fail(where: str) -> None:
        if where == fails_in and session.step_number == 2:
            raise RuntimeError(GONE)

    def evaluated() -> dict[str, float]:
        fail("evaluate")
        return {}

    with session:
        for step in session:
            for batch in step:
                loss = cross_entropy(session.model, batch)
                loss.register_hook(lambda _: fail("backward"))
                session.backward(loss)
            session.step()
            session.evaluate(evaluated)
    return session


@pytest.mark.parametrize("where", ["backward", "evaluate"])
def test_what_an_exchange_raises_ends_a_run_whose_group_stays(tmp_path: Path, where: str) -> None:
    with pytest.raises(RuntimeError, match="closed by peer"):
        trained(tmp_path, fails_in=where)


def test_it_is_in_no_rehearsal_and_is_not_asked_to_leave(tmp_path: Path) -> None:
    session = trained(tmp_path, fails_in="nowhere")
    assert session.finished
    assert not session.rehearsing
    assert not session.left


def test_only_what_an_exchange_raises_says_that_a_member_is_gone() -> None:
    assert lost_peer(RuntimeError(GONE)) == f"RuntimeError: {GONE}"
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_peer(ValueError(GONE)) is None
