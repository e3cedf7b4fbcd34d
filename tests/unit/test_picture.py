"""The picture of a run shows what its folder holds: no more, no less, and the same each time."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from orchestrator.errors import RunFolderError, StorageError
from orchestrator.report.curves import POINTS, band, smooth, thin
from orchestrator.report.picture import FORMATS, draw, save
from orchestrator.report.story import read, title

CONFIG = """
task: {name: digits}
train: {samples: 1000}
batch: {initial: 32, micro_batch: 16, max: 512}
optimizer: {name: sgd, lr: 0.05}
controller: {policy: noise_scale, every_samples: 128, confidence: 0.9}
"""
NAN = math.nan


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def step(number: int, *, seen: int, batch: int = 32, **values: Any) -> dict[str, Any]:
    return {
        "attempt": 1, "step": number, "samples_seen": seen, "global_batch": batch, "world_size": 1, "lr": 0.05,
        "loss": 2.0, "noise_scale": 40.0, "noise_low": 30.0, "noise_high": 60.0, "verdict": "measured",
    } | values  # fmt: skip


def steps(*batches: int, **values: Any) -> list[dict[str, Any]]:
    ends = itertools.accumulate(batches)
    return [
        step(i, seen=seen, batch=batch, **values) for i, (seen, batch) in enumerate(zip(ends, batches, strict=True))
    ]


def decision(number: int, *, target: int, effective: int | None = None, attempt: int = 1) -> dict[str, Any]:
    row = {"attempt": attempt, "kind": "decision", "step": number, "samples_seen": 0, "target_batch": target}
    return row if effective is None else row | {"effective_step": effective}


def evaluation(number: int, *, seen: int, attempt: int = 1, **metrics: float) -> dict[str, Any]:
    return {"attempt": attempt, "step": number, "samples_seen": seen} | metrics


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def make_run(
        metrics: Iterable[dict[str, Any]],
        *,
        events: Iterable[dict[str, Any]] = (),
        evals: Iterable[dict[str, Any]] = (),
        config: str = CONFIG,
    ) -> Path:
        (tmp_path / "config.yaml").write_text(config)
        for name, rows in (("metrics", metrics), ("events", events), ("evals", evals)):
            write(tmp_path / f"{name}.jsonl", rows)
        return tmp_path

    return make_run


def long_run(num_steps: int, *, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """A run that doubles its batch six times, and whose measurements come and go at random: the hardest to draw."""
    random = np.random.default_rng(seed)
    seen, batch = 0, 32
    rows, events, evals = [], [], []
    for i in range(num_steps):
        if i and i % (num_steps // 7) == 0:
            batch *= 2
            events.append(decision(i - 3, target=batch, effective=i))
        seen += batch
        noise = 30 * math.exp(4 * i / num_steps + 0.1 * random.normal())
        high = noise * 2 * math.exp(0.3 * random.normal()) if random.random() > 0.15 else None
        values = {
            "lr": 0.05 * math.cos(1.5 * i / num_steps),
            "loss": 1.5 + 3 * math.exp(-5 * i / num_steps) + 0.2 * random.normal(),
            "world_size": min(16, max(1, batch // 128)),
            "noise_scale": noise if random.random() > 0.02 else None,
            "noise_low": noise / 1.5 * math.exp(0.2 * random.normal()) if random.random() > 0.05 else None,
            "noise_high": high,
            "verdict": "too noisy" if high is None else "measured",
        }
        rows.append(step(i, seen=seen, batch=batch, **values))
        if i % max(1, num_steps // 100) == 0:
            evals.append(evaluation(i, seen=seen, accuracy=1 - 0.5 ** (1 + i / num_steps), loss=1.0))
    return {"metrics": rows, "events": events, "evals": evals}


# What is read


def test_steps_and_decisions_and_evaluations_that_were_undone_are_not_shown(make: Callable[..., Path]) -> None:
    redone = [step(i, seen=32 * (i + 1), attempt=2, loss=1.0) for i in (2, 3)]
    run = make(
        [*steps(32, 32, 32, 64), *redone],
        events=[decision(0, target=32), decision(2, target=64, effective=3)],
        evals=[evaluation(1, seen=64, accuracy=0.5), evaluation(3, seen=160, accuracy=0.9)],
    )
    story = read(run)
    assert story.seen.tolist() == [32, 64, 96, 128]
    assert story.loss.tolist() == [2, 2, 1, 1]
    assert story.changes == ()
    assert story.evaluated.tolist() == [0.5]


def test_an_evaluation_by_the_attempt_that_resumed_after_the_last_step_counts(make: Callable[..., Path]) -> None:
    story = read(make(steps(32, 32), evals=[evaluation(1, seen=64, attempt=2, accuracy=0.7)]))
    assert story.evaluated.tolist() == [0.7]


def test_a_decision_is_marked_where_its_batch_begins(make: Callable[..., Path]) -> None:
    events = [decision(0, target=32), decision(1, target=64, effective=3), decision(4, target=128, effective=9)]
    assert read(make(steps(32, 32, 32, 64, 64), events=events)).changes == ((96, 64),)


def test_the_rest_of_the_data_in_the_last_step_is_no_change_of_batch(make: Callable[..., Path]) -> None:
    story = read(make(steps(32, 64, 7), events=[{"attempt": 1, "kind": "started", "step": 0, "total_samples": 103}]))
    assert story.batch.tolist() == [32, 64, 64]


def test_the_metric_shown_is_the_first_that_is_not_the_loss(make: Callable[..., Path]) -> None:
    assert (
        read(make(steps(32), evals=[evaluation(0, seen=32, loss=1.0, bits_per_character=2.0)])).metric
        == "bits_per_character"
    )


@pytest.mark.parametrize("torn", ["", '{"attempt": 1, "st'])
def test_a_run_without_a_step_is_refused(make: Callable[..., Path], torn: str) -> None:
    run = make([])
    (run / "metrics.jsonl").write_text(torn)
    with pytest.raises(RunFolderError, match="has not finished a step yet"):
        read(run)


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunFolderError, match=r"holds no run \(no config.yaml\); give the folder of a run"):
            read(folder)


@pytest.mark.parametrize(
    ("batches", "workers", "said"),
    [
        ((32, 32), (1, 1), "digits: the batch stayed at 32 on 1 worker"),
        ((32, 2048), (1, 4), "digits: the batch grew from 32 to 2,048 on 1 to 4 workers"),
        ((64, 32), (2, 2), "digits: the batch shrank from 64 to 32 on 2 workers"),
    ],
)
def test_the_title_says_what_became_of_the_batch(
    make: Callable[..., Path], batches: tuple[int, int], workers: tuple[int, int], said: str
) -> None:
    rows = [row | {"world_size": n} for row, n in zip(steps(*batches), workers, strict=True)]
    assert title(read(make(rows))) == (said, f"{sum(batches):,} samples seen")


def test_the_title_ends_with_the_last_evaluation_and_shortens_an_import_path(make: Callable[..., Path]) -> None:
    config = CONFIG.replace("digits", "a_company.with_long.names:small_model")
    evals = [evaluation(0, seen=32, word_accuracy=0.5), evaluation(1, seen=64, word_accuracy=0.98765)]
    headline, outcome = title(read(make(steps(32, 32), evals=evals, config=config)))
    assert headline.startswith("small_model: the batch")
    assert outcome == "64 samples seen; held-out word accuracy 0.9877"


# What is drawn


def test_the_panels_hold_the_numbers_of_the_run(make: Callable[..., Path]) -> None:
    rows = [
        row | {"world_size": n, "lr": lr}
        for row, n, lr in zip(steps(32, 32, 64, 64), (1, 1, 1, 2), (0.1, 0.1, 0.2, 0.2), strict=True)
    ]
    evals = [evaluation(1, seen=64, accuracy=0.5), evaluation(3, seen=192, accuracy=0.75)]
    story = read(make(rows, events=[decision(0, target=64, effective=2)], evals=evals))
    batch, strip, lr, loss, held_out = draw(story).axes
    lines = {line.get_label(): line for line in batch.get_lines()}
    assert lines["batch"].get_xydata().tolist() == [[0, 32], [64, 64], [192, 64]]
    assert lines["batch"].get_drawstyle() == "steps-post"
    assert lines["decision"].get_xydata().tolist() == [[64, 64]]
    assert lines["noise scale"].get_ydata()[:-1].tolist() == [40] * 4
    assert "unsure" not in lines
    assert "ceiling" not in lines
    assert [text.get_text() for text in strip.texts] == ["1 worker", "2 workers"]
    assert lr.get_lines()[0].get_xydata().tolist() == [[0, 0.1], [32, 0.1], [64, 0.1], [128, 0.2], [192, 0.2]]
    assert loss.get_lines()[0].get_ydata().tolist() == [2] * 4
    assert held_out.get_lines()[0].get_xydata().tolist() == [[64, 0.5], [192, 0.75]]
    assert (loss.get_xlabel(), held_out.get_ylabel()) == ("samples seen", "held-out accuracy")


def test_the_ceiling_is_drawn_once_the_batch_reached_it(make: Callable[..., Path]) -> None:
    lines = draw(read(make(steps(256, 512)))).axes[0].get_lines()
    assert [line.get_ydata()[0] for line in lines if line.get_label() == "ceiling"] == [512]


def test_the_band_has_a_gap_where_unknown_and_reaches_the_top_where_it_has_no_upper_end(
    make: Callable[..., Path],
) -> None:
    unknown = {"noise_scale": None, "noise_low": None, "noise_high": None, "verdict": "too noisy"}
    unbounded = {"noise_high": None, "verdict": "too noisy"}
    kinds = [{}, {}, unknown, unknown, {}, {}, unbounded, unbounded]
    figure = draw(read(make([row | kind for row, kind in zip(steps(*[32] * 8), kinds, strict=True)])))
    axes = figure.axes[0]
    bands = {band.get_label(): band for band in axes.collections}
    closed = [path.vertices for path in bands["90 % interval"].get_paths()]
    assert [(v[:, 0].min(), v[:, 0].max()) for v in closed] == [(32, 64), (160, 192)]
    assert all((v[:, 1].min(), v[:, 1].max()) == (30, 60) for v in closed)
    (opened,) = (path.vertices for path in bands["no upper end"].get_paths())
    assert (opened[:, 0].min(), opened[:, 0].max()) == (192, 256)
    assert (opened[:, 1].min(), opened[:, 1].max()) == (30, axes.get_ylim()[1])
    lines = {line.get_label(): line for line in axes.get_lines()}
    np.testing.assert_array_equal(lines["noise scale"].get_xdata(), [32, 64, NAN, 160, 192, NAN])
    np.testing.assert_array_equal(lines["unsure"].get_xdata(), [192, 224, 256, NAN])


def test_a_far_upper_end_does_not_flatten_the_rest(make: Callable[..., Path]) -> None:
    bottom, top = draw(read(make(steps(32, 64, noise_high=1e9)))).axes[0].get_ylim()
    assert bottom < 30
    assert 64 < top < 1000


def test_two_losses_share_one_scale(make: Callable[..., Path]) -> None:
    evals = [evaluation(0, seen=32, loss=9.0), evaluation(1, seen=64, loss=3.0)]
    *_, loss, held_out = draw(read(make(steps(32, 32), evals=evals))).axes
    assert loss.get_ylim() == held_out.get_ylim()
    assert loss.get_ylim()[0] < 2 < 9 < loss.get_ylim()[1]


def test_a_loss_that_fell_tenfold_is_drawn_on_a_logarithmic_scale(make: Callable[..., Path]) -> None:
    rows = [row | {"loss": 5 * 0.9**i} for i, row in enumerate(steps(*[32] * 60))]
    assert draw(read(make(rows))).axes[3].get_yscale() == "log"


def test_nothing_but_one_unmeasured_step_can_be_drawn(make: Callable[..., Path]) -> None:
    nothing = {
        "noise_scale": None,
        "noise_low": None,
        "noise_high": None,
        "verdict": "too few micro-batches",
        "loss": None,
    }
    axes = draw(read(make(steps(32, **nothing)))).axes
    assert len(axes) == 4
    assert [line.get_label() for line in axes[0].get_lines()] == ["batch"]


@pytest.mark.parametrize("num_steps", [12, 700, 5000])
def test_no_text_lies_on_another_or_leaves_the_figure(make: Callable[..., Path], num_steps: int) -> None:
    figure = draw(read(make(**long_run(num_steps))))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in _texts(figure)]
    assert {"batch", "samples seen", "held-out accuracy", "16 workers"} <= {text for text, _ in shown}
    for text, box in shown:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in itertools.combinations(shown, 2):
        assert not a.overlaps(b), (one, other)


def _texts(figure: Figure) -> Iterator[Text]:
    yield from figure.texts
    for axes in figure.axes:
        yield from axes.texts
        legend = axes.get_legend()
        yield from legend.get_texts() if legend else ()
        for axis in (each for each in (axes.xaxis, axes.yaxis) if each.get_visible()):
            if axis.label.get_text():
                yield axis.label
            low, high = sorted(axis.get_view_interval())
            # An axis without labels has ticks all the same.
            for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False):
                if low <= at <= high and label.get_text():
                    yield label


# What is written


def test_the_same_folder_gives_the_same_bytes_whatever_matplotlib_is_set_to(make: Callable[..., Path]) -> None:
    run = make(**long_run(200))
    for kind in FORMATS:
        save(read(run), run / f"one{kind}")
        with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "axes.facecolor": "black"}):
            save(read(run), run / f"two{kind}")
        assert (run / f"one{kind}").read_bytes() == (run / f"two{kind}").read_bytes()


@pytest.mark.parametrize("num_steps", [POINTS // 2, POINTS, 6000])
def test_an_svg_is_small_enough_for_a_readme(make: Callable[..., Path], num_steps: int) -> None:
    run = make(**long_run(num_steps))
    save(read(run), run / "picture.svg")
    assert (run / "picture.svg").stat().st_size < 200_000


def test_a_file_that_cannot_be_written_or_named_is_refused(make: Callable[..., Path]) -> None:
    story = read(make(steps(32)))
    with pytest.raises(StorageError, match="cannot write the picture"):
        save(story, Path("/dev/null/picture.svg"))
    with pytest.raises(ValueError, match=r"ends in .svg or .png, got 'picture.pdf'"):
        save(story, Path("picture.pdf"))


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, orchestrator.report.picture; print('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


# The pieces

ends = st.tuples(st.none() | st.floats(1, 10), st.none() | st.floats(10, 100))


@given(st.lists(ends, min_size=1, max_size=30))
def test_each_segment_of_a_band_is_bounded_or_open_or_absent(pairs: list[tuple[float | None, float | None]]) -> None:
    low = np.array([NAN if a is None else a for a, _ in pairs])
    high = np.array([NAN if a is None or b is None else b for a, b in pairs])
    closed, opened = band(np.arange(len(pairs), dtype=float), low, high)
    drawn = [{(a, b) for a, b in itertools.pairwise(part[0]) if not math.isnan(a + b)} for part in (closed, opened)]
    for i in range(len(pairs) - 1):
        known = not np.isnan(low[i : i + 2]).any()
        bounded = known and not np.isnan(high[i : i + 2]).any()
        assert ((i, i + 1) in drawn[0]) == bounded
        assert ((i, i + 1) in drawn[1]) == (known and not bounded)
    assert all(b == a + 1 for part in drawn for a, b in part)


@given(st.integers(0, 2**32 - 1), st.integers(2, 3000), st.integers(60, 900), st.floats(0, 0.2))
def test_thinning_keeps_the_extremes_and_bridges_no_gap(seed: int, size: int, points: int, turning: float) -> None:
    random = np.random.default_rng(seed)
    x = np.cumsum(random.integers(1, 100, size)).astype(float)
    lines = random.normal(size=(2, size))
    for line in lines:
        line[np.cumsum(random.random(size) < turning) % 2 == 1] = NAN
    at = thin(x, *lines, points=points)
    assert len(at) == size if size <= points else len(at) <= 3 * points
    assert (np.diff(at) > 0).all()
    assert {0, size - 1} <= set(at.tolist())
    for line in lines:
        np.testing.assert_array_equal(
            [np.fmin.reduce(line[at]), np.fmax.reduce(line[at])], [np.fmin.reduce(line), np.fmax.reduce(line)]
        )
        for left, right in itertools.pairwise(at):
            if not np.isnan(line[[left, right]]).any():
                assert not np.isnan(line[left : right + 1]).any()


def test_thinning_a_long_line_without_gaps_keeps_its_budget() -> None:
    x = np.arange(100_000.0)
    assert len(thin(x, np.sin(x), points=500)) <= 502


def test_smoothing_keeps_a_constant_and_forgets_half_in_a_half_life() -> None:
    weights = np.array([3.0, 1.0, 8.0, 2.0])
    np.testing.assert_allclose(smooth(np.full(4, 7.0), weights, half_life=5.0), 7.0, rtol=1e-12)
    # Weighted mean of the values with weights (1 - 1/2) * 1/2 and 1/2.
    np.testing.assert_allclose(
        smooth(np.array([3.0, 9.0]), np.array([4.0, 4.0]), half_life=4.0), [3.0, 7.0], rtol=1e-12
    )
    np.testing.assert_array_equal(smooth(np.array([NAN, 3.0, NAN]), np.ones(3), half_life=1.0), [NAN, 3.0, 3.0])
