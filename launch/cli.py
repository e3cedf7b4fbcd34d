"""The ``groundswell`` command. Heavy imports wait until a command needs them, so that help answers at once."""

from __future__ import annotations

import click

from launch.config_commands import config_group
from launch.doctor import doctor_command
from launch.ledger_command import ledger_group
from launch.plot_command import plot_command
from launch.run_command import run_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="groundswell", prog_name="groundswell")
def main() -> None:
    """Train PyTorch models with a global batch that grows with the measured gradient noise scale."""


main.add_command(run_command)
main.add_command(config_group)
main.add_command(doctor_command)
main.add_command(ledger_group)
main.add_command(plot_command)


if __name__ == "__main__":
    main()
