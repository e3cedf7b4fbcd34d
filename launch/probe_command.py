"""``groundswell probe``: how large is the noise scale of a model as it stands, and what batch would follow from it?"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch import options
from launch.bundled import read_config
from launch.ray_cluster import add_working_directory
from launch.remote_runs import at_hand
from orchestrator.config import RunConfig
from orchestrator.errors import GroundswellError

if TYPE_CHECKING:
    from orchestrator.runtime.probe import Probe
    from orchestrator.types import NoiseStats

_PRECISION = 0.1
_PLAIN_WIDTH = 120  # columns, where no terminal says its own


@click.command("probe", short_help="Measure the noise scale, train nothing.")
@click.argument("config")
@click.option("--checkpoint", metavar="DIR", help="A run's folder or URL, or a checkpoint's.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many to measure on, at most the data set; 4096, or the data set, when left out.",
)
@click.option(
    "--groups",
    type=click.Choice(["layers", "none"]),
    default="layers",
    show_default=True,
    help="Measure each layer besides the whole, or only the whole.",
)
@options.overrides
@options.no_plugins
def probe_command(
    config: str, checkpoint: str | None, samples: int | None, groups: str, overrides: tuple[str, ...], no_plugins: bool
) -> None:
    """Measure the noise scale of CONFIG's model without training it, and say what batch would follow.

    The model is the seeded one that a run begins with, or that of --checkpoint: the newest whole one of a run.

    \b
    Exit codes: 0 measured, or said to be too noisy; 2 refused, with the reason.
    """
    add_working_directory()
    try:
        settings = read_config(config, overrides, plugins=not no_plugins)
        from orchestrator.runtime.probe import probe

        with nullcontext() if checkpoint is None else at_hand(checkpoint, checkpoint=True) as path:
            found = probe(settings, checkpoint=path, samples=samples, by_layer=groups == "layers")
    except GroundswellError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    show(found, settings, console=console)


def show(found: Probe, config: RunConfig, *, console: Console) -> None:
    """Print what was measured, then what follows from it."""
    from orchestrator.core.probing import relative_precision

    _say_what_was_used(found, config, console)
    stats, samples = found.stats, found.plan.samples
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row("noise scale", Text(f"{_interval(stats, config)}  {stats.verdict.value}"), style="bold")
    numbers.add_row("|G|^2", _number(stats.grad_sq))
    numbers.add_row("tr(Sigma)", _number(stats.trace_cov))
    numbers.add_row("loss", _number(found.loss))
    console.print(numbers)
    console.print()
    _say_layers(found, config, console)
    now = relative_precision(stats)
    if not stats.bounded or now is None:
        _say_too_noisy(found, config, console)
        return
    _say_advice(found, config, console)
    _say(console, _precision_text(found, now))
    if found.dataset_size - samples < found.plan.micro_batch:
        _say(console, f"The data set gives no more{_smaller('; smaller micro-batches would measure better', config)}.")


def _say_what_was_used(found: Probe, config: RunConfig, console: Console) -> None:
    for fault in found.passed_over:
        _say(console, f"passed over {fault.path}: {fault.why}; the one before it is used")
    plan = found.plan
    model = f"the seeded model (run.seed {config.run.seed})" if found.checkpoint is None else found.checkpoint
    _say(console, f"{config.run.name}: task {config.task.name}, {model}, on {found.device}")
    _say(
        console,
        f"The first {plan.samples:,} samples of the run's stream ({found.dataset_size:,} in the data set), in "
        f"{len(plan.groups)} groups of {_span(plan.groups)} micro-batches of {plan.micro_batch}; nothing was trained.",
    )
    if config.measure.estimator == "norm_layers":
        _say(console, "Measured per_example: a probe has no calibration that norm_layers could go by.")
    console.print()


def _say_layers(found: Probe, config: RunConfig, console: Console) -> None:
    """A line for each module that owns parameters."""
    if not found.layers:
        return
    _say(console, "By layer (tr(Sigma) and |G|^2 add up to the whole's, so its noise scale is no mean of these):")
    table = Table.grid(padding=(0, 2))
    for name, stats in found.layers.items():
        table.add_row(Text(f"  {name}"), _interval(stats, config), stats.verdict.value)
    console.print(table)
    console.print()


def _smaller(advice: str, config: RunConfig) -> str:
    """``advice`` on the size of the micro-batches, where it is they that are compared; of samples there are no more."""
    from orchestrator.measure.estimators import find_estimator

    return advice if find_estimator(config.measure.estimator).compares == "micro_batches" else ""


def _say_too_noisy(found: Probe, config: RunConfig, console: Console) -> None:
    stats, samples = found.stats, found.plan.samples
    low = "" if stats.low is None else f"; it is above {_number(stats.low)}, without an upper end"
    _say(console, f"Too noisy: {samples:,} samples cannot tell the noise scale{low}. No policy would change the batch.")
    more = "How many more samples would tell cannot be said from an interval without two ends"
    left = found.dataset_size - samples
    _say(
        console,
        f"{more}; try --samples {min(4 * samples, found.dataset_size)}."
        if left > 0
        else f"{more}, and all of the data set was used"
        + _smaller(": give --set batch.micro_batch a smaller number", config)
        + ".",
    )


def _say_advice(found: Probe, config: RunConfig, console: Console) -> None:
    """The policies' batches, the rules' factors at them, and why some were not asked."""
    initial, advice = config.batch.initial, found.advice
    ceiling = min(config.batch.max, found.dataset_size)
    _say(
        console,
        f"Batch that each policy would choose, from batch.initial {initial} and at once, between 1 and {ceiling}:",
    )
    policies = Table.grid(padding=(0, 2))
    for name, decision in advice.decisions.items():
        policies.add_row(f"  {name}", str(decision.target_batch), Text(decision.reason))
    console.print(policies)
    console.print()
    own = config.lr_rule.name
    _say(console, f"Learning rate at that batch, as a factor on the one for batch {initial} (lr_rule.name is {own}):")
    rules = Table.grid(padding=(0, 2))
    if len(advice.decisions) > 1:
        rules.add_row("", *advice.decisions)
    for name, factors in advice.factors.items():
        rules.add_row(f"  {name}", *(f"{factor:.3g}" for factor in factors.values()))
    console.print(rules)
    console.print()
    if advice.left_out:
        _say(console, "Left out (--set controller.policy or lr_rule.name, and the missing key, asks for one):")
        for name, why in advice.left_out.items():
            _say(console, f"  {name}: {why}")
        console.print()


def _precision_text(found: Probe, now: float) -> str:
    from orchestrator.core.probing import more_samples_for

    more = more_samples_for(found.stats, samples=found.plan.samples, precision=_PRECISION)
    told = f"Half the interval's width is {100 * now:.0f} % of the noise scale"
    wanted = f"{100 * _PRECISION:g} %"
    if not more:
        return f"{told}: {wanted} is reached."
    beyond = found.plan.samples + more > found.dataset_size
    end = ", more than the data set has left." if beyond else "."
    return f"{told}; {wanted} would need about {more:,} more samples{end}"


def _interval(stats: NoiseStats, config: RunConfig) -> str:
    scale = "not known" if stats.noise_scale is None else f"{_number(stats.noise_scale)} samples"
    if stats.low is None and stats.high is None:
        return scale
    high = "no upper end" if stats.high is None else _number(stats.high)
    low = _number(stats.low)
    return f"{scale}  [{low}, {high}] at {100 * config.controller.confidence:g} %"


def _span(groups: tuple[int, ...]) -> str:
    return str(groups[0]) if min(groups) == max(groups) else f"{min(groups)} or {max(groups)}"


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
