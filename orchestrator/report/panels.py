"""What does each panel of the picture show, and on which scale?

In samples: the batch and the noise scale with its interval. Below: the workers, the learning rate, and the losses with
the held-out metric.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.report.curves import Floats, band, held, smooth, stretches, take, thin
from orchestrator.report.story import Story, metric_text, workers_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion, and darker forms of their green and purple: told apart with any colour vision.
_BATCH, _NOISE, _LR, _METRIC, _LOSS = "#0072B2", "#D55E00", "#007A5A", "#A3447C", "#222222"


def draw_batch(axes: Axes, story: Story) -> None:
    bottom, top = _batch_limits(story)
    axes.plot(*held(story.batch, story.seen), color=_BATCH, linewidth=2.2, drawstyle="steps-post", label="batch")
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
        among = stretches(segments)
        if len(among):
            axes.plot(take(x, among), take(noise, among), color=_NOISE, zorder=1.9, **look)
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


def draw_workers(axes: Axes, story: Story) -> None:
    edges, counts = held(story.workers, story.seen)
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
        text = next((t for t in (workers_text(int(count)), f"{count:.0f}") if share > 0.014 * len(t)), None)
        if text:
            axes.text((begin + end) / 2, 0.46, text, ha="center", va="center", fontsize=8.5)


def draw_lr(axes: Axes, story: Story) -> None:
    at = thin(story.seen, story.lr)
    # Held through each step; where steps were left out, stairs would be of our making.
    drawstyle: Any = "steps-pre" if len(at) == len(story.lr) else "default"
    axes.plot(np.append(0.0, story.seen[at]), np.append(story.lr[0], story.lr[at]), color=_LR, drawstyle=drawstyle)
    axes.set_ylim(0, 1.12 * float(np.nanmax(story.lr)) or 1.0)
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.spines["right"].set_visible(False)


def draw_loss(axes: Axes, story: Story) -> None:
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
    beside.set_ylabel(f"held-out {metric_text(story.metric)}", color=_METRIC, parse_math=False)
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


def _count(value: float) -> str:
    """``0.5``, ``64``, ``32,768``, ``131k``, ``1.05M``."""
    if value < 1:
        return f"{value:g}"
    if value < 1e5:
        return f"{value:,.0f}"
    return f"{value / 1e3:.3g}k" if value < 1e6 else f"{value / 1e6:.3g}M"
