"""Shows a run while it trains: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.progress import Progress, metrics_text

_REFRESH_S = 0.25
_PLAIN_EVERY_S, _PLAIN_AT_MOST_EVERY_S = 5.0, 60.0
_QUIET_AFTER_S = 5.0
_PANEL_LINES = 12  # without what happened


def show(
    progress: Progress,
    *,
    going: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
    console: Console | None = None,
) -> None:
    """Show a run until ``going`` says no; ``tick`` is called between two looks, and may end it by raising."""
    console = Console() if console is None else console
    if console.is_terminal and not console.is_dumb_terminal:
        _show_panel(progress, console, going=going, tick=tick)
    else:
        show_plain(progress, going=going, tick=tick)


def show_plain(progress: Progress, *, going: Callable[[], bool], tick: Callable[[], None] = lambda: None) -> None:
    """The same in lines: what happens as it happens, and the numbers less and less often."""
    last_s = float("-inf")
    shown: dict[str, Any] | None = None
    while True:
        on = going()
        for line in progress.update():
            say(line)
        tick()
        every_s = min(_PLAIN_AT_MOST_EVERY_S, max(_PLAIN_EVERY_S, progress.running_s / 20))
        due = progress.running_s - last_s >= every_s or not on
        if due and progress.now is not None and progress.now is not shown and progress.samples_per_s is not None:
            last_s, shown = progress.running_s, progress.now
            say(plain_line(progress, progress.now))
        if not on:
            return
        if not progress.behind:
            time.sleep(_REFRESH_S)


def _show_panel(progress: Progress, console: Console, *, going: Callable[[], bool], tick: Callable[[], None]) -> None:
    with _no_control_echo(), Live(console=console, auto_refresh=False) as live:
        while True:
            on = going()
            progress.update()
            for line in progress.heard:
                console.print(Text(line))  # above the panel
            tick()
            if on and progress.behind:
                continue
            live.update(panel(progress, events=max(1, min(6, console.height - _PANEL_LINES))), refresh=True)
            if not on:
                return
            time.sleep(_REFRESH_S)


@contextmanager
def _no_control_echo() -> Iterator[None]:
    """Keep the terminal from writing ``^C`` into the panel, which would push it down by a line."""
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (OSError, ValueError, termios.error):  # nobody types here
        yield
        return
    without = [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]]
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, without)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)


def plain_line(progress: Progress, row: Mapping[str, Any]) -> str:
    total = progress.total_samples
    of = "" if total is None else f"/{total:,} ({row['samples_seen'] / total:.0%})"
    return (
        f"{row['samples_seen']:,}{of}  loss {row['loss']:.4f}  noise scale {noise_text(row)}  "
        f"batch {batch_text(row)}  lr {row['lr']:.3g}  {number(progress.samples_per_s)} samples/s  "
        f"{duration(progress.time_left_s)} left"
    )


def panel(progress: Progress, *, events: int) -> Panel:
    """The numbers of the newest step under a bar, and the last ``events`` things that happened."""
    row, total = progress.now, progress.total_samples
    told = [Text(line, style=_style(line), overflow="ellipsis", no_wrap=True) for line in progress.told[-events:]]
    if row is None or total is None:
        waited = f"starting ... {duration(progress.running_s)} (torch, the task and its workers are loaded)"
        return Panel(
            Group(Text(waited, overflow="ellipsis", no_wrap=True), *told), title=progress.name, title_align="left"
        )
    seen = int(row["samples_seen"])
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    left = "done" if seen >= total else f"{duration(progress.time_left_s)} left"
    bar.add_row(ProgressBar(total=total, completed=seen), f"{seen / total:.0%}, {left}")
    numbers = Table.grid(padding=(0, 2))
    numbers.add_column(style="dim", justify="right", no_wrap=True)
    numbers.add_column(no_wrap=True, overflow="ellipsis")
    epochs = total / seen * row["epoch"]
    numbers.add_row("samples seen", f"{seen:,} of {total:,} (epoch {row['epoch']:.1f} of {epochs:,.4g})")
    numbers.add_row("loss", number(None) if row["loss"] is None else f"{row['loss']:.4f}")
    if progress.evaluation is not None:
        at = progress.evaluation["samples_seen"]
        numbers.add_row("held out", f"{metrics_text(progress.evaluation)} (at {at:,} samples)")
    numbers.add_row("noise scale", noise_text(row))
    numbers.add_row("global batch", f"{batch_text(row)}  (workers x accumulation x micro-batch)")
    numbers.add_row("learning rate", f"{row['lr']:.4g}")
    pause = f", no step for {duration(progress.quiet_s)}" if progress.quiet_s > _QUIET_AFTER_S else ""
    numbers.add_row("samples/s", f"{number(progress.samples_per_s)}{pause if seen < total else ''}")
    return Panel(Group(bar, numbers, *told), title=progress.name, title_align="left")


def noise_text(row: Mapping[str, Any]) -> str:
    """``310 [250, 402]``; an interval without an upper end is shown as such, an unknown number as its verdict."""
    if row["noise_low"] is None:
        return f"not known ({row['verdict']})"
    if row["noise_scale"] is None:
        return f"above {number(row['noise_low'])}"
    high = "no upper end" if row["noise_high"] is None else number(row["noise_high"])
    return f"{number(row['noise_scale'])} [{number(row['noise_low'])}, {high}]"


def batch_text(row: Mapping[str, Any]) -> str:
    """Global batch = workers x accumulation x micro-batch, and what an uneven list leaves out of that."""
    workers, accum, micro = row["world_size"], row["accum_steps"], row["micro_batch"]
    less = workers * accum * micro - row["global_batch"]
    return f"{row['global_batch']} = {workers} x {accum} x {micro}" + (f" - {less}" if less else "")


def number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.2g}" if abs(value) < 10 else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def say(line: str, *, error: bool = False) -> None:
    """Print a line; a reader that went away (``| head``, a closed terminal) is no reason to end training."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(f"{line}\n", end="", file=stream, flush=True)  # in one piece: threads speak too
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _style(line: str) -> str:
    return "yellow" if line.startswith(("fault", "warning", "checkpoint", "plan rejected", "a worker")) else "dim"
