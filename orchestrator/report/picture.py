"""One figure that explains one run at a glance: did the batch follow the noise scale, and what did it cost the loss?

The same folder gives the same SVG, byte for byte. matplotlib, an optional extra, is imported by ``draw`` and not
before.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StorageError
from orchestrator.report.curves import held
from orchestrator.report.panels import draw_batch, draw_loss, draw_lr, draw_workers
from orchestrator.report.story import Story, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")

_FAINT = "#888888"
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
        draw_batch(top, story)
        draw_workers(strip, story)
        draw_lr(middle, story)
        draw_loss(bottom, story)
        for axes in (top, strip, middle, bottom):
            axes.set_xlim(0, story.seen[-1])
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if axes is not bottom:
                axes.tick_params(axis="x", length=0, labelbottom=False)
            for change in held(story.workers, story.seen)[0][1:-1]:
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
