"""`corral doctor`: is this installation sound, and if not, what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from corral.cli import logs, output
from corral.cli.checks import Finding, installation
from corral.cli.options import config_option, json_option
from corral.config.reader import load as load_config
from corral.errors import Refused


@click.command("doctor")
@config_option
@json_option
def command(config_path: Path | None, as_json: bool) -> None:
    """Check configuration, folder, keys, database, services, clock and plugins; one line each, with the remedy.

    Changes nothing. Exits with 1 if anything is down.
    """
    logs.configure("critical", "console")
    try:
        config = load_config(path=config_path)
    except Refused as refused:
        remedy = "correct it; corral config init PATH writes a file with every key to compare"
        findings = [Finding("configuration", "down", fault, remedy) for fault in refused.faults]
    else:
        findings = list(installation(config))
    if as_json:
        output.table([finding.row() for finding in findings], (), as_json=True)
    else:
        for finding in findings:
            _line(finding)
    if any(finding.status == "down" for finding in findings):
        sys.exit(1)


def _line(finding: Finding) -> None:
    status = click.style(f"{finding.status:<8}", fg=output.COLOURS[finding.status])
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    click.echo(f"{status} {finding.check:<14} {finding.detail}{remedy}")
