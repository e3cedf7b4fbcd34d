"""How does a run's config differ from the one it was begun with, and may it?

What a checkpoint's state belongs to may not change: the stream of samples, the model, the optimizer. What says how
long, where or how fast the run goes on may; and so may what is read afresh at every step, such as the learning rate,
which is then written down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.execution import ACCEPTABLE
from orchestrator.config.run_config import RunConfig
from orchestrator.config.yaml_writer import excerpt
from orchestrator.errors import ConfigError, Problem

_FIXED: Mapping[str, str] = {
    "run.seed": "the order of the samples is drawn from it",
    "optimizer.name": "the checkpoint holds the state of the other one",
    "optimizer": "the checkpoint holds it with the optimizer's state, and the run would go on with the old value",
}
_EMA = "train.ema_half_life_samples"
# Where and how the run is kept, watched and paid for, of which no number that it trains with depends.
_SILENT = ("run", "data", "workers", "evaluation", "checkpoint", "recovery", "cluster", "tracking", "budget", "ledger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A key, dotted, with plain values; ``None`` for one that was not given."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {excerpt(self.before)} -> {excerpt(self.now)}"

    @property
    def refused(self) -> str | None:
        """Why a run does not go on with it."""
        if self.key == _EMA and self.before is None:
            return "the checkpoint holds no averaged weights"
        if self.key == "optimizer.lr":
            return None
        return next((why for fixed, why in {**ACCEPTABLE, **_FIXED}.items() if _lies_in(self.key, fixed)), None)

    @property
    def is_told(self) -> bool:
        """Whether the run trains otherwise from here on."""
        return self.key.partition(".")[0] not in _SILENT


def differences(before: Mapping[str, Any], now: RunConfig) -> list[Difference]:
    """Between ``now`` and ``before``, a config as plain data; keys that it does not know are of a newer version."""
    return list(_walk(before, now.model_dump(mode="json"), ()))


def refuse_changes(found: Sequence[Difference], *, accepted: Sequence[str], source: str) -> None:
    """Raises ``ConfigError`` that lists every difference with which the run in ``source`` does not go on."""
    problems = []
    for difference in found:
        why = difference.refused
        if why is None or any(_lies_in(difference.key, key) for key in accepted):
            continue
        fix = f"write {excerpt(difference.before)} again, or begin a new run under another run.name"
        acceptable = next((key for key in ACCEPTABLE if _lies_in(difference.key, key)), None)
        if acceptable is not None:
            fix += f"; where model and samples are the same all the same, recovery.accept_changed: [{acceptable}]"
        problems.append(
            Problem(
                source=source,
                key=difference.key,
                value=excerpt(difference.now),
                rule=f"the run was trained with {excerpt(difference.before)}, and cannot go on with another: {why}",
                fix=fix,
            )
        )
    if problems:
        raise ConfigError(*problems)


def _walk(before: Mapping[str, Any], now: Mapping[str, Any], above: tuple[str, ...]) -> list[Difference]:
    found: list[Difference] = []
    of_the_users = above == ("task", "options")  # where a key that is not there was not given
    for key in dict.fromkeys((*now, *(before if of_the_users else ()))):
        if key not in before and not of_the_users:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _walk(old, new, (*above, key))
        elif old != new:
            found.append(Difference(key=".".join((*above, key)), before=old, now=new))
    return found


def _lies_in(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")
