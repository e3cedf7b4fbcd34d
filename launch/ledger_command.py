"""``groundswell ledger verify``: was every sample used exactly once?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from orchestrator.errors import GroundswellError


@click.group("ledger")
def ledger_group() -> None:
    """Look into the ledger of a run that was made with ledger: true."""


@ledger_group.command("verify")
@click.argument("run", type=click.Path(path_type=Path))
def verify_command(run: Path) -> None:
    """Prove that RUN used every position exactly once, or name the first violation (exit code 1)."""
    from orchestrator.runtime.ledger import verify

    try:
        report = verify(run)
    except GroundswellError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    click.echo(report.text)
    sys.exit(0 if report.violation is None else 1)
