"""What has come of a run, from its folder: whether it is finished, how it ended in a few lines, and the exit codes."""

from __future__ import annotations

import math
import shlex
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.live import duration
from launch.progress import counted, metrics_text
from orchestrator.config import RunConfig
from orchestrator.runtime import folder
from orchestrator.runtime.spending import exhausted

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED = 1, 2, 130
_ENDS = ("finished", "stopped")
_BEGINS_AND_ENDS = ("started", "resumed", *_ENDS)


def is_finished(settings: RunConfig, path: Path) -> bool:
    """Whether the run in ``path`` has seen all samples that ``settings`` ask for."""
    events = [row for row in folder.rows(path / folder.EVENTS) if row["kind"] in _BEGINS_AND_ENDS]
    if not events or events[-1]["kind"] != "finished":
        return False
    size = next(int(row["dataset_size"]) for row in events if "dataset_size" in row)
    train = settings.train
    total = train.samples if train.samples is not None else round((train.epochs or 0) * size)
    return int(events[-1]["samples_seen"]) >= total


def nothing_to_do(settings: RunConfig, path: Path) -> str | None:
    """Why the run in ``path`` is not to be gone on with: it is finished, or its budget is used up."""
    if is_finished(settings, path):
        return f"{path} is finished; for a longer run raise train.samples or train.epochs.\n{summary(path)}"
    used_up = exhausted(settings, path)
    if used_up is None:
        return None
    return f"Nothing was started: {used_up}; to go on with {path}, raise budget in its config."


def ended_as_planned(event: Mapping[str, Any]) -> bool:
    """Whether a run that stopped by ``event`` is not to be begun again by itself: its budget or an order ended it."""
    return bool(event.get("budget_worker_hours") or event.get("ordered"))


def planned_end(path: Path) -> str | None:
    """How the newest attempt ended, in a line, where that was planned, and nobody need try again."""
    newest = deque((row for row in folder.rows(path / folder.EVENTS) if row["kind"] in _BEGINS_AND_ENDS), maxlen=1)
    if not newest or not ended_as_planned(newest[0]):
        return None
    return f"Ended at {newest[0]['samples_seen']:,} samples: {newest[0]['reason']}."


def summary(path: Path, *, took_s: float | None = None) -> str:
    """How a finished run ended, in a few plain lines."""
    steps = folder.surviving(path / folder.METRICS)
    evals = folder.surviving(path / folder.EVALS)
    if not steps:
        return "No step was taken."
    first, last = steps[0], steps[-1]
    largest = max(row["global_batch"] for row in steps)
    workers = counted(first["world_size"], "worker")
    if last["world_size"] != first["world_size"]:
        workers = f"{first['world_size']} to {last['world_size']} workers"
    batch = f"batch {first['global_batch']}" + (f" to {largest}" if largest > first["global_batch"] else "")
    took = "" if took_s is None else f" in {duration(took_s)}"
    ended = deque((row for row in folder.rows(path / folder.EVENTS) if row["kind"] in _ENDS), maxlen=1)
    how = "Finished" if not ended or ended[0]["kind"] == "finished" else "So far"
    lines = [f"{how}{took}: {last['samples_seen']:,} samples in {len(steps):,} steps, {batch}, {workers}."]
    if evals:
        lines.append(f"Held out: {metrics_text(evals[-1])}")
    lines += _budget_lines(path)
    lines += advice_lines(path)
    lines.append(f"Picture:   {shlex.join(['groundswell', 'plot', str(path)])}")
    lines.append(f"Curves:    {shlex.join(['tensorboard', '--logdir', str(path / 'tensorboard')])}")
    lines.append(f"Decisions: {path / folder.EVENTS}")
    return "\n".join(lines)


def _budget_lines(path: Path) -> list[str]:
    """What of its budget the run has used, where it has one."""
    newest = deque((row for row in folder.rows(path / folder.EVENTS) if row["kind"] == "budget"), maxlen=1)
    return [f"Used:      {row['reason']}." for row in newest]


def advice_lines(path: Path) -> list[str]:
    """What a run that only advised said at its newest end; nothing for other runs."""
    advice: dict[str, Any] | None = None
    for row in folder.rows(path / folder.EVENTS):
        if row["kind"] in ("started", "resumed"):
            advice = None  # a later attempt may act
        elif row["kind"] == "advice":
            advice = row
    if advice is None:
        return []
    lines = [f"Advice:    {advice['reason']}."]
    if advice.get("config"):
        sections = yaml.safe_dump(advice["config"], default_flow_style=True, sort_keys=False, width=math.inf)
        lines.append(f"           As a config: {sections.strip()}")
    return lines
