"""One figure that explains one run at a glance: did the batch follow the noise scale, and what did it cost the loss?

Everything comes from the run's folder, and only the history that counts is drawn. The same folder gives the same SVG,
byte for byte. matplotlib, an optional extra, is imported by ``draw`` and not before.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config_file import load_config
from orchestrator.errors import RunFolderError, StorageError
from orchestrator.runtime import folder
from orchestrator.types import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

FORMATS = (".svg", ".png")
POINTS = 700  # of one line: about as many as the figure has pixels across, and small enough for a README

# Okabe and Ito's blue and vermilion, and darker forms of their green and purple: told apart with any colour vision.
_BATCH, _NOISE, _LR, _METRIC, _LOSS, _FAINT = "#0072B2", "#D55E00", "#007A5A", "#A3447C", "#222222", "#888888"
_STYLE = {
    "svg.fonttype": "path",  # a README's reader may not have the font
    "svg.hashsalt": "groundswell",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What the picture shows of a run. Arrays have one entry a step, NaN where unknown; counts are in samples."""

    task: str
    ceiling: int  # batch.max
    confidence: float  # of the noise scale's interval, a fraction
    seen: Floats  # samples seen after the step
    batch: Floats
    workers: Floats
    lr: Floats
    loss: Floats
    noise: Floats
    low: Floats
    high: Floats  # NaN beside a known ``low``: the interval has no upper end
    measured: NDArray[np.bool_]
    changes: tuple[tuple[int, int], ...]  # where a decision changed the batch: (samples seen, new batch)
    metric: str | None  # None: nothing was evaluated yet
    evaluated_at: Floats
    evaluated: Floats


def read(run: Path) -> Story:
    """The surviving history of the run in the folder ``run``.

    Raises ``RunFolderError`` for a folder that holds no run, or a run without a step; ``ConfigError`` for a config
    that was made unreadable.
    """
    if not (run / folder.CONFIG).is_file():
        raise RunFolderError(f"{run} holds no run (no {folder.CONFIG}); give the folder of a run, such as runs/digits")
    rows = folder.surviving(run / folder.METRICS)
    if not rows:
        raise RunFolderError(f"the run in {run} has not finished a step yet; there is something to draw once it has")
    config = load_config(run / folder.CONFIG)
    events = list(folder.rows(run / folder.EVENTS))
    batch = _column(rows, "global_batch")
    total = max((int(event["total_samples"]) for event in events if "total_samples" in event), default=None)
    if total is not None and len(rows) > 1 and rows[-1]["samples_seen"] >= total:
        # The last step takes what is left of the data, which nobody decided.
        batch[-1] = max(batch[-2:])
    metric, evals = _evaluations(run, rows)
    return Story(
        task=config.task.name,
        ceiling=int(config.batch.max or config.batch.initial),
        confidence=config.controller.confidence,
        seen=_column(rows, "samples_seen"),
        batch=batch,
        workers=_column(rows, "world_size"),
        lr=_column(rows, "lr"),
        loss=_column(rows, "loss"),
        noise=_column(rows, "noise_scale"),
        low=_column(rows, "noise_low"),
        high=_column(rows, "noise_high"),
        measured=np.array([row["verdict"] == Verdict.MEASURED.value for row in rows]),
        changes=_changes(events, rows),
        metric=metric,
        evaluated_at=_column(evals, "samples_seen"),
        evaluated=_column(evals, metric or ""),
    )


def title(story: Story) -> tuple[str, str]:
    """Two sentences: what was trained and how its batch and workers changed; how long, and how well it ended."""
    # An import path may be long; the factory's name alone then says enough.
    task = story.task if len(story.task) <= 32 else story.task.rpartition(":")[2]
    first, last = int(story.batch[0]), int(story.batch[-1])
    verb = "stayed at" if first == last else f"{'grew' if last > first else 'shrank'} from {first:,} to"
    fewest, most = int(story.workers.min()), int(story.workers.max())
    workers = f"{fewest} to {most} workers" if most > fewest else _workers(most)
    known = story.evaluated[np.isfinite(story.evaluated)]
    result = f"; held-out {_words(story.metric)} {known[-1]:.4g}" if story.metric and len(known) else ""
    return f"{task}: the batch {verb} {last:,} on {workers}", f"{int(story.seen[-1]):,} samples seen{result}"


def draw(story: Story) -> Figure:
    """The figure, 8 by 6.4 inches, without a canvas. Raises ``ModuleNotFoundError`` where matplotlib is missing."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(8.0, 6.4), facecolor="white")
        grid = figure.add_gridspec(
            4, 1, height_ratios=(3.4, 0.24, 1.25, 2.1), left=0.1, right=0.91, top=0.86, bottom=0.075, hspace=0.16
        )
        top, strip, middle, bottom = (figure.add_subplot(grid[i, 0]) for i in range(4))
        for y, text, weight in zip((0.955, 0.918), title(story), ("bold", "normal"), strict=True):
            figure.text(0.1, y, text, fontsize=10.5, weight=weight, parse_math=False)
        _draw_batch(top, story)
        _draw_workers(strip, story)
        _draw_lr(middle, story)
        _draw_loss(bottom, story)
        for axes in (top, strip, middle, bottom):
            axes.set_xlim(0, story.seen[-1])
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if axes is not bottom:
                axes.tick_params(axis="x", length=0, labelbottom=False)
            for change in _held(story.workers, story.seen)[0][1:-1]:
                axes.axvline(change, color=_FAINT, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.9)
        bottom.set_xlabel("samples seen")
        figure.align_ylabels([top, middle, bottom])
    return figure


def save(story: Story, path: Path) -> None:
    """Write the picture as SVG or PNG, as the suffix of ``path`` says.

    Raises ``ValueError`` for another suffix, ``StorageError`` when the file cannot be written, and
    ``ModuleNotFoundError`` where matplotlib is missing.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise ValueError(f"a picture's file ends in {' or '.join(FORMATS)}, got {path.name!r}")
    figure = draw(story)
    from matplotlib import style

    # No date and no version: drawing an unchanged run again changes nothing in its repository.
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == ".svg" else {"Software": None}
    drawn = io.BytesIO()
    with style.context(["default", _STYLE]):
        figure.savefig(drawn, format=kind[1:], dpi=200, metadata=metadata)
    # A hundredth of a point is a hundredth of a pixel; the further digits of the lines would be half of the file.
    data = re.sub(rb"(?m)^([ML] -?\d+\.\d\d)\d*( -?\d+\.\d\d)\d*", rb"\1\2", drawn.getvalue())
    try:
        path.write_bytes(data if kind == ".svg" else drawn.getvalue())
    except OSError as error:
        raise StorageError(f"cannot write the picture {path}: {error}; choose another place with -o") from error


def thin(x: Floats, *lines: Floats, points: int = POINTS) -> NDArray[np.intp]:
    """Indices of about ``points`` entries that look the same as all: of each bin of ``x`` (rising) the lowest and the
    highest of each line, and both ends of ``x``.

    Where two known neighbours among them would bridge something unknown, that is kept too.
    """
    if len(x) <= points:
        return np.arange(len(x))
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], max(1, points // (2 * len(lines))) + 1))
    kept = {0, len(x) - 1}
    for line, (begin, end) in itertools.product(lines, itertools.pairwise(edges.tolist())):
        if not np.isnan(line[begin:end]).all():
            kept |= {begin + int(np.nanargmin(line[begin:end])), begin + int(np.nanargmax(line[begin:end]))}
    gaps = [np.flatnonzero(np.isnan(line)) for line in lines]
    bridged: set[int] = {-1}
    while bridged:  # what is kept for one line may be known in another
        at = np.array(sorted(kept), dtype=np.intp)
        bridged = {int(i) for line, gap in zip(lines, gaps, strict=True) for i in _bridged(line[at], gap, at)}
        kept |= bridged
    return at


def band(x: Floats, low: Floats, high: Floats) -> tuple[tuple[Floats, Floats, Floats], tuple[Floats, Floats]]:
    """An interval cut into its bounded stretches ``(x, low, high)`` and those without an upper end ``(x, low)``.

    A stretch ends in NaN. One that has an open end at either side is open; nothing is drawn where ``low`` is unknown.
    """
    known, bounded = ~np.isnan(low), ~np.isnan(low) & ~np.isnan(high)
    closed = bounded[:-1] & bounded[1:]
    open_ = known[:-1] & known[1:] & ~closed
    both, one = _stretches(closed), _stretches(open_)
    return (_take(x, both), _take(low, both), _take(high, both)), (_take(x, one), _take(low, one))


def smooth(values: Floats, weights: Floats, *, half_life: float) -> Floats:
    """Running mean in which a value counts half after ``half_life`` of weight; the unknown are passed over."""
    total = weight = 0.0
    result = np.full(len(values), np.nan)
    for i, (value, w) in enumerate(zip(values.tolist(), weights.tolist(), strict=True)):
        if math.isfinite(value):
            keep = 0.5 ** (w / half_life)
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        if weight:
            result[i] = total / weight
    return result


# The panels


def _draw_batch(axes: Axes, story: Story) -> None:
    bottom, top = _batch_limits(story)
    axes.plot(*_held(story.batch, story.seen), color=_BATCH, linewidth=2.2, drawstyle="steps-post", label="batch")
    if story.changes:
        dots: dict[str, Any] = {"color": _BATCH, "markersize": 6, "markeredgecolor": "white", "clip_on": False}
        axes.plot(*zip(*story.changes, strict=True), "o", label="decision", **dots)
    if story.batch.max() >= story.ceiling > story.batch.min():
        axes.axhline(story.ceiling, color=_BATCH, linewidth=0.9, linestyle=(0, (6, 3)), label="ceiling")
    at = thin(story.seen, story.noise)
    x, noise, sure = story.seen[at], story.noise[at], story.measured[at]
    known = ~np.isnan(noise[:-1]) & ~np.isnan(noise[1:])
    trusted = known & sure[:-1] & sure[1:]
    line: dict[str, Any] = {"label": "noise scale"}
    dotted: dict[str, Any] = {"label": "unsure", "linestyle": (0, (1, 1.5)), "linewidth": 1.1}
    for segments, look in ((trusted, line), (known & ~trusted, dotted)):
        among = _stretches(segments)
        if len(among):
            axes.plot(_take(x, among), _take(noise, among), color=_NOISE, zorder=1.9, **look)
    at = thin(story.seen, story.low, story.high)
    closed, opened = band(story.seen[at], story.low[at], story.high[at])
    if len(closed[0]):
        share = f"{100 * story.confidence:.3g} % interval"
        axes.fill_between(*closed, color=_NOISE, alpha=0.22, linewidth=0, label=share)
    if len(opened[0]):
        hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": _NOISE, "alpha": 0.35, "hatch": "////"}
        axes.fill_between(*opened, top, linewidth=0, label="no upper end", **hatched)
    _powers_of_two(axes, bottom, top)
    axes.set_ylabel("samples")
    axes.spines["right"].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=7, frameon=False, fontsize=8.5, handlelength=1.6,
        columnspacing=1.3, handletextpad=0.5, borderaxespad=0.1,
    )  # fmt: skip


def _draw_workers(axes: Axes, story: Story) -> None:
    edges, counts = _held(story.workers, story.seen)
    most = float(story.workers.max())
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for begin, end, count in zip(edges[:-1], edges[1:], counts[:-1], strict=True):
        # From pale to dark with the logarithm, so that 1 and 2 differ as much as 8 and 16.
        depth = 0.12 + 0.5 * math.log2(1 + count) / math.log2(1 + most) if most > 1 else 0.25
        axes.axvspan(begin, end, color=_BATCH, alpha=depth, linewidth=0)
        share = (end - begin) / story.seen[-1]
        text = next((t for t in (_workers(int(count)), f"{count:.0f}") if share > 0.014 * len(t)), None)
        if text:
            axes.text((begin + end) / 2, 0.46, text, ha="center", va="center", fontsize=8.5)


def _draw_lr(axes: Axes, story: Story) -> None:
    at = thin(story.seen, story.lr)
    # Held through each step; where steps were left out, stairs would be of our making.
    drawstyle: Any = "steps-pre" if len(at) == len(story.lr) else "default"
    axes.plot(np.append(0.0, story.seen[at]), np.append(story.lr[0], story.lr[at]), color=_LR, drawstyle=drawstyle)
    axes.set_ylim(0, 1.12 * float(np.nanmax(story.lr)) or 1.0)
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.spines["right"].set_visible(False)


def _draw_loss(axes: Axes, story: Story) -> None:
    line = smooth(story.loss, np.diff(story.seen, prepend=0.0), half_life=story.seen[-1] / 100)
    for values, look in (
        (story.loss, {"alpha": 0.28, "linewidth": 0.7}),
        (line, {"linewidth": 1.5, "marker": "." if len(line) == 1 else ""}),
    ):
        at = thin(story.seen, values)
        axes.plot(story.seen[at], values[at], color=_LOSS, **look)
    axes.set_ylabel("training loss", color=_LOSS)
    _loss_scale(axes, story.loss, line)
    axes.spines["right"].set_visible(False)
    if story.metric is None:
        return
    beside = axes.twinx()
    beside.grid(False)
    beside.spines["right"].set_color(_METRIC)
    at = thin(story.evaluated_at, story.evaluated)
    small = 3.5 if len(at) <= 60 else 0.0
    beside.plot(story.evaluated_at[at], story.evaluated[at], "o-", color=_METRIC, markersize=small, clip_on=False)
    beside.set_ylabel(f"held-out {_words(story.metric)}", color=_METRIC, parse_math=False)
    beside.tick_params(axis="y", colors=_METRIC)
    if story.metric == "loss":
        # Two losses are compared with each other, which takes one scale.
        low, high = zip(axes.get_ylim(), beside.get_ylim(), strict=True)
        for each in (axes, beside):
            each.set(yscale=axes.get_yscale(), ylim=(min(low), max(high)))
    beside.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _loss_scale(axes: Axes, raw: Floats, line: Floats) -> None:
    """Logarithmic where the loss fell tenfold; a few outliers of single steps may leave the panel."""
    raw, line = raw[np.isfinite(raw)], line[np.isfinite(line)]
    if len(raw) and raw.min() > 0 and line.max() > 10 * line.min():
        axes.set_yscale("log")
        axes.set_ylim(np.quantile(raw, 0.01) / 1.2, np.quantile(raw, 0.995) * 1.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _powers_of_two(axes: Axes, bottom: float, top: float) -> None:
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom, top)
    exponents = range(math.ceil(math.log2(bottom)), math.floor(math.log2(top)) + 1)
    axes.set_yticks([2.0**e for e in exponents[:: math.ceil(len(exponents) / 8)]], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: _count(value))
    axes.minorticks_off()


def _batch_limits(story: Story) -> tuple[float, float]:
    """Room for the batch and the trusted noise scale; an interval's far end may leave the panel."""
    shown = np.concatenate([story.batch, story.noise[story.measured & (story.noise > 0)]])
    shown = shown[np.isfinite(shown)]
    least, most = float(shown.min()), float(shown.max())
    ends = np.concatenate([story.noise, story.low, story.high])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    if len(ends):
        least, most = max(min(least, float(ends.min())), least / 2), min(max(most, float(ends.max())), most * 4)
    return least / 1.4, most * 1.4


# What was read


def _column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)


def _evaluations(run: Path, rows: Sequence[dict[str, Any]]) -> tuple[str | None, list[dict[str, Any]]]:
    """The metric to show, the first that is not the loss, and the evaluations of steps that count."""
    attempts = {row["step"]: row["attempt"] for row in rows}
    # A later attempt may evaluate a step that it resumed from; an earlier one's was undone if the step was redone.
    evals = [
        row for row in folder.surviving(run / folder.EVALS)
        if row["step"] in attempts and row["attempt"] >= attempts[row["step"]]
    ]  # fmt: skip
    names = [name for row in evals[-1:] for name in row if name not in ("attempt", "step", "samples_seen")]
    return next((name for name in names if name != "loss"), names[0] if names else None), evals


def _changes(events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> tuple[tuple[int, int], ...]:
    steps = {row["step"]: row for row in rows}
    found = []
    for event in events:
        decided, taken = steps.get(event["step"]), steps.get(event.get("effective_step"))
        if event["kind"] == "decision" and decided and taken and decided["attempt"] == event["attempt"]:
            found.append((int(taken["samples_seen"] - taken["global_batch"]), int(event["target_batch"])))
    return tuple(found)


def _held(values: Floats, seen: Floats) -> tuple[Floats, Floats]:
    """What is held between changes: the samples at which each value begins, then the end with the last value again."""
    begins = np.append(0.0, seen[:-1])
    at = np.flatnonzero(np.append(True, np.diff(values) != 0))
    return np.append(begins[at], seen[-1]), np.append(values[at], values[-1])


def _stretches(segments: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Indices of the points along each stretch of segments (i, i + 1) that are true, -1 after each."""
    found: list[int] = []
    for i, kept in enumerate(segments.tolist()):
        if kept:
            found += [i + 1] if found and found[-1] == i else [i, i + 1]
        elif found and found[-1] == i:
            found.append(-1)
    if found and found[-1] != -1:
        found.append(-1)
    return np.array(found, dtype=np.intp)


def _bridged(kept: Floats, gaps: NDArray[np.intp], at: NDArray[np.intp]) -> NDArray[np.intp]:
    """The first of the unknown ``gaps`` between each two neighbours of ``at`` whose values ``kept`` are both known."""
    if not len(gaps):
        return gaps
    first = gaps[np.minimum(np.searchsorted(gaps, at[:-1]), len(gaps) - 1)]
    known = ~np.isnan(kept)
    return first[known[:-1] & known[1:] & (first > at[:-1]) & (first < at[1:])]


def _take(values: Floats, at: NDArray[np.intp]) -> Floats:
    return np.append(values, math.nan)[at]


def _workers(count: int) -> str:
    return f"{count} worker" if count == 1 else f"{count} workers"


def _count(value: float) -> str:
    """``0.5``, ``64``, ``32,768``, ``131k``, ``1.05M``."""
    if value < 1:
        return f"{value:g}"
    if value < 1e5:
        return f"{value:,.0f}"
    return f"{value / 1e3:.3g}k" if value < 1e6 else f"{value / 1e6:.3g}M"


def _words(name: str | None) -> str:
    return (name or "").replace("_", " ")
