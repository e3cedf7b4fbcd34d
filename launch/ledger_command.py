"""``groundswell ledger verify``: was every sample used exactly once?"""

from __future__ import annotations

import sys

import click

from launch.remote_runs import at_hand
from orchestrator.errors import GroundswellError


@click.group("ledger")
def ledger_group() -> None:
    """Look into the ledger of a run that was made with ledger: true."""


@ledger_group.command("verify")
@click.argument("run")
def verify_command(run: str) -> None:
    """Prove that RUN (folder or URL) used every position exactly once, or name the first violation (exit code 1)."""
    from orchestrator.runtime.ledger import verify

    try:
        with at_hand(run) as path:
            report = verify(path)
    except GroundswellError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(report.text)
    sys.exit(0 if report.violation is None else 1)
