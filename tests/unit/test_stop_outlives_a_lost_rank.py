"""A stop that the controller asks for once is heard, though the exchange that told of it was lost with a rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.ports import Commands
from orchestrator.runtime.worker import local_worker
from orchestrator.session import Session
from tests.support import blobs, config, cross_entropy, mlp


class StopsOnce:
    """A controller that asks for a stop at its first look."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._asked = inner, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commands(self) -> Commands:
        asked, self._asked = self._asked, True
        return Commands() if asked else Commands(stop="the budget is used up")


def test_a_stop_that_was_lost_on_its_way_is_said_again(tmp_path: Path) -> None:
    settings, model = config(tmp_path), mlp()
    local = local_worker(settings)
    brain: Any = StopsOnce(local.brain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Session(
        settings, model=model, optimizer=optimizer, dataset=blobs(), worker=replace(local, brain=brain)
    ) as session:
        for step in session:
            for batch in step:
                session.backward(cross_entropy(session.model, batch))
            session.step()
            if session.step_number == 1:
                session._boundary.give_up()  # as when a rank is lost
    assert session.step_number == 2
