"""The ``groundswell`` command. Heavy imports wait until a command needs them, so that help answers at once."""

from __future__ import annotations

from importlib import metadata

import click

from launch.checkpoints_command import checkpoints_group
from launch.config_commands import config_group
from launch.control_command import control_command
from launch.doctor import doctor_command
from launch.job_commands import list_command, logs_command, status_command, stop_command
from launch.kubernetes.commands import k8s_group
from launch.ledger_command import ledger_group
from launch.plot_command import plot_command
from launch.probe_command import probe_command
from launch.run_command import run_command
from launch.submit_command import submit_command
from launch.torchrun_command import torchrun_command


def _print_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or context.resilient_parsing:
        return
    try:
        version = metadata.version("groundswell")
    except metadata.PackageNotFoundError:
        version = "of a checkout that is not installed"
    click.echo(f"groundswell {version}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def main() -> None:
    """Train PyTorch models with a global batch that grows with the measured gradient noise scale.

    Begin with: groundswell run digits
    """


_COMMANDS = (
    *(run_command, torchrun_command, control_command),
    *(submit_command, status_command, logs_command, stop_command, list_command),  # on a Ray cluster
    *(k8s_group, probe_command, config_group, doctor_command, ledger_group, checkpoints_group, plot_command),
)
for _command in _COMMANDS:
    main.add_command(_command)


if __name__ == "__main__":
    main(prog_name="groundswell")
