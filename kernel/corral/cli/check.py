"""The `corral check` command, which checks a plugin against the plugin contract."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corral.cli import logging_setup, output
from corral.cli.output import config_option, json_option
from corral.config.reader import load as load_config

if TYPE_CHECKING:
    from corral.config.model import Config


@click.command("check")
@click.argument("name")
@click.option(
    "--postgres-url",
    envvar="CORRAL_CHECK_POSTGRES_URL",
    help="also check the plugin against the empty PostgreSQL database at this URL",
)
@click.option("--all", "show_all", is_flag=True, help="list all rules, not only the violated ones")
@config_option
@json_option
def check_command(name: str, postgres_url: str | None, show_all: bool, config_path: Path | None, as_json: bool) -> None:
    """Check the installed plugin NAME against the plugin contract.

    The plugin runs in a temporary installation and does not have to be enabled. The exit status is 1 if the plugin
    breaks a rule.
    """
    logging_setup.configure("critical", "console")
    rows = check_rules(load_config(path=config_path), name, postgres_url)
    followed = sum(row["result"] == "ok" for row in rows)
    is_ok = followed == len(rows)
    if as_json:
        output.print_value({"plugin": name, "ok": is_ok, "findings": rows}, as_json=True, text="")
    else:
        shown = [row for row in rows if show_all or row["result"] != "ok"]
        if shown:
            output.print_table(shown, ("result", "rule", "detail"), as_json=False, colour_of="result")
        click.echo(f"{name} follows {followed} of {len(rows)} rules.")
    if not is_ok:
        sys.exit(1)


def check_rules(config: Config, name: str, postgres_url: str | None = None) -> list[dict[str, str]]:
    """Check the installed plugin with this name, and return the `result`, the `rule` and the `detail` of each rule.

    Log messages are suppressed from then on.
    """
    from corral.cli.enabled_plugins import find_plugin
    from corral.plugins.discovery import discover
    from corral.plugins.record import PluginRecord

    found = find_plugin([PluginRecord(found=item) for item in discover(config)], name).found
    try:
        kind = found.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise click.ClickException(f"the plugin {name} cannot be imported: {type(error).__name__}: {error}") from None
    # The test kit belongs to a ring outside the command line, so it is imported by name, as commands are.
    check_plugin = importlib.import_module("corral.testing.conformance").check_plugin
    logging.disable(logging.CRITICAL)
    report = check_plugin(
        kind, postgres_url=postgres_url, section=config.plugins.tables.get(name), plugin_dir=config.plugins.dir
    )
    return [
        {"result": "ok" if finding.ok else "failed", "rule": finding.rule, "detail": finding.detail}
        for finding in report.findings
    ]
