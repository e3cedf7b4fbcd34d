"""Shows a run while it trains, from its folder alone: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.runtime import folder

_REFRESH_S = 0.25
_PLAIN_EVERY_S = 5.0


@final
class Tail:
    """The lines that were added to a file since it was last looked at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return [json.loads(line) for line in data[:whole].splitlines() if line.strip()]


@final
class Picture:
    """The newest numbers of a run."""

    def __init__(self, path: Path, *, since: float) -> None:
        self._since = since
        self._metrics, self._evals, self._events = (
            Tail(path / name) for name in (folder.METRICS, folder.EVALS, folder.EVENTS)
        )
        self.total_samples: int | None = None
        self.now: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        self.said: list[dict[str, Any]] = []
        self._first: tuple[float, int] | None = None
        self._rate: float | None = None

    def update(self, clock_s: float) -> list[dict[str, Any]]:
        """Read on; returns the events that are new in this run of the command."""
        fresh = [event for event in self._events.read() if event["time"] >= self._since]
        for event in fresh:
            if event["kind"] in ("started", "resumed"):
                self.total_samples, self._first = event["total_samples"], None
        self.said += [event for event in fresh if event["kind"] not in ("plan", "checkpoint")]
        rows = self._metrics.read()
        if rows and self.total_samples is not None:
            self.now = rows[-1]
            seen = int(self.now["samples_seen"])
            if self._first is None:
                self._first = (clock_s, seen)
            elif clock_s > self._first[0]:
                self._rate = (seen - self._first[1]) / (clock_s - self._first[0])
        for row in self._evals.read():
            self.evaluation = row
        return fresh

    def time_left_s(self) -> float | None:
        if self.now is None or not self._rate or self.total_samples is None:
            return None
        return (self.total_samples - self.now["samples_seen"]) / self._rate


def follow(path: Path, *, while_true: Callable[[], bool], since: float) -> None:
    """Show the run at ``path`` until ``while_true`` says no; events before the wall time ``since`` are old."""
    console = Console()
    picture = Picture(path, since=since)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=1 / _REFRESH_S, get_renderable=lambda: panel(path.name, picture)):
            while while_true():
                picture.update(time.monotonic())
                time.sleep(_REFRESH_S)
            picture.update(time.monotonic())
        return
    last_s = float("-inf")
    while True:
        going = while_true()
        for event in picture.update(time.monotonic()):
            if event["kind"] not in ("plan", "checkpoint"):
                _say(describe_event(event))
        if picture.now is not None and (time.monotonic() - last_s > _PLAIN_EVERY_S or not going):
            last_s = time.monotonic()
            _say(plain_line(picture))
        if not going:
            return
        time.sleep(_REFRESH_S)


def plain_line(picture: Picture) -> str:
    row = picture.now
    assert row is not None, "there is a row to show"
    left = _duration(picture.time_left_s())
    return (
        f"{row['samples_seen']}/{picture.total_samples} samples  loss {row['loss']:.4f}  "
        f"noise scale {noise_text(row)}  batch {batch_text(row)}  lr {row['lr']:.3g}  "
        f"{_number(row['samples_per_s'])} samples/s  {left} left"
    )


def panel(name: str, picture: Picture) -> Panel:
    row = picture.now
    if row is None or picture.total_samples is None:
        return Panel(Text("starting ..."), title=name)
    numbers = Table.grid(padding=(0, 2))
    numbers.add_column(style="dim", justify="right")
    numbers.add_column()
    numbers.add_row("samples seen", f"{row['samples_seen']:,} of {picture.total_samples:,} (epoch {row['epoch']:.1f})")
    numbers.add_row("loss", f"{row['loss']:.4f}")
    if picture.evaluation is not None:
        skip = ("attempt", "step", "samples_seen")
        numbers.add_row("held out", "  ".join(f"{k} {v:.4g}" for k, v in picture.evaluation.items() if k not in skip))
    numbers.add_row("noise scale", noise_text(row))
    numbers.add_row("global batch", batch_text(row))
    numbers.add_row("learning rate", f"{row['lr']:.4g}")
    numbers.add_row("samples/s", _number(row["samples_per_s"]))
    numbers.add_row("time left", _duration(picture.time_left_s()))
    bar = ProgressBar(total=picture.total_samples, completed=row["samples_seen"])
    events = [
        Text(describe_event(event), style="dim", overflow="ellipsis", no_wrap=True) for event in picture.said[-4:]
    ]
    return Panel(Group(bar, numbers, *events), title=name)


def noise_text(row: dict[str, Any]) -> str:
    """``310 [250, 402]``; an interval without an upper end is shown as such, an unknown number as its verdict."""
    if row["noise_low"] is None:
        return str(row["verdict"])
    high = "no upper end" if row["noise_high"] is None else f"{row['noise_high']:.0f}"
    middle = "?" if row["noise_scale"] is None else f"{row['noise_scale']:.0f}"
    return f"{middle} [{row['noise_low']:.0f}, {high}]"


def batch_text(row: dict[str, Any]) -> str:
    """Global batch = workers x accumulation x micro-batch, marked ``about`` where the list is uneven."""
    workers, accum, micro = row["world_size"], row["accum_steps"], row["micro_batch"]
    sign = "=" if workers * accum * micro == row["global_batch"] else "of at most"
    return f"{row['global_batch']} {sign} {workers} x {accum} x {micro}"


def describe_event(event: dict[str, Any]) -> str:
    at = "" if event["samples_seen"] is None else f" at {event['samples_seen']} samples"
    return f"{event['kind'].replace('_', ' ')}{at}: {event['reason']}"


def _say(line: str) -> None:
    print(line, flush=True, file=sys.stdout)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
