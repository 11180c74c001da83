"""The command `corral check`: verifies a plugin against the contract."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import click

from corral.cli import logs, output
from corral.cli.output import config_option, json_option
from corral.config.reader import load as load_config


@click.command("check")
@click.argument("name")
@click.option("--postgres-url", envvar="CORRAL_CHECK_POSTGRES_URL", help="an empty database: check there too")
@click.option("--all", "show_all", is_flag=True, help="show the rules that are kept, too")
@config_option
@json_option
def command(name: str, postgres_url: str | None, show_all: bool, config_path: Path | None, as_json: bool) -> None:
    """Verify the installed plugin NAME against the contract, on a kernel in a temporary folder.

    It need not be enabled. Exits with 1 if a rule is broken.
    """
    from corral.cli.plugin_set import find
    from corral.plugins.discovery import discover
    from corral.plugins.record import PluginRecord

    config = load_config(path=config_path)
    logs.configure("critical", "console")
    found = find([PluginRecord(found=item) for item in discover(config)], name).found
    try:
        kind = found.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise click.ClickException(f"{name} cannot be imported: {type(error).__name__}: {error}") from None
    # The test kit belongs to a ring outside the command line, so it is imported by name, as commands are.
    check_plugin = importlib.import_module("corral.testing.conformance").check_plugin
    logging.disable(logging.CRITICAL)
    report = check_plugin(
        kind, postgres_url=postgres_url, section=config.plugins.tables.get(name), plugin_dir=config.plugins.dir
    )
    rows = [
        {"result": "ok" if finding.ok else "failed", "rule": finding.rule, "detail": finding.detail}
        for finding in report.findings
    ]
    if as_json:
        output.value({"plugin": name, "ok": report.ok, "findings": rows}, as_json=True, text="")
    else:
        shown = [row for row in rows if show_all or row["result"] != "ok"]
        if shown:
            output.table(shown, ("result", "rule", "detail"), as_json=False, colour_of="result")
        click.echo(f"{name}: {sum(finding.ok for finding in report.findings)} of {len(rows)} rules are kept.")
    if not report.ok:
        sys.exit(1)
