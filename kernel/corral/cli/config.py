"""The command `corral config`: shows effective values and their sources, checks them, and writes a commented file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from corral.cli import output
from corral.cli.commands import FAILED, REFUSED
from corral.cli.output import config_option, json_option
from corral.config.reader import load as load_config
from corral.config.reader import sample


@click.group("config")
def command() -> None:
    """Show, check or write the configuration."""


@command.command("show")
@click.argument("prefix", required=False, default="")
@config_option
@json_option
def show(prefix: str, config_path: Path | None, as_json: bool) -> None:
    """Show every effective value with its source, secrets masked; PREFIX narrows (server, database.url, …)."""
    config = load_config(path=config_path)
    rows = [
        {"key": row.key, "value": row.value, "source": row.source, "about": row.doc, "secret": row.secret}
        for row in config.describe()
        if row.key == prefix or row.key.startswith(f"{prefix}." if prefix else "")
    ]
    if prefix and not rows:
        raise click.UsageError(f"no key is or begins with {prefix}")
    if not as_json:
        click.echo(f"file: {config.path or 'none'}", err=True)
    output.table(rows, ("key", "value", "source"), as_json=as_json)  # about: only in JSON, and in `config init`


@command.command("check")
@config_option
@json_option
def check(config_path: Path | None, as_json: bool) -> None:
    """Check file, variables, the plugins' sections and the pinned settings. Nothing is changed.

    Exits with 3 when the server would refuse to start, 1 when it would start without one of its plugins.
    """
    from corral.cli.sessions import scratch

    config = load_config(path=config_path)
    rows: list[dict[str, Any]] = [{"status": "warning", "detail": warning} for warning in config.warnings]
    with scratch(config) as kernel:
        kernel.refuse_without_essentials()
        rows += [{"status": "warning", "detail": warning} for warning in kernel.settings.unknown_names()]
        for item in kernel.plugins:
            if item.state in ("failed", "blocked"):
                rows.append({"status": "failed", "detail": f"plugin {item.name} is {item.state}: {item.reason}"})
        known = {item.name for item in kernel.plugins}
    for key, names in (("enabled", config.plugins.enabled), ("disabled", config.plugins.disabled)):
        rows += [
            {"status": "warning", "detail": f"plugins.{key}: no plugin {name} is installed"}
            for name in names
            if name not in known
        ]
    rows += [
        {"status": "warning", "detail": f"[plugins.{name}]: no plugin of this name is installed"}
        for name in config.plugins.tables
        if name not in known
    ]
    file = f"{config.path or 'No file, the defaults and the environment'}: valid."
    output.table(rows, ("status", "detail"), as_json=as_json, empty=file, colour_of="status")
    if any(row["status"] == "failed" for row in rows):
        sys.exit(REFUSED if config.plugins.strict else FAILED)


@command.command("init")
@click.argument("path", required=False, type=click.Path(dir_okay=False, path_type=Path))
@json_option
def init(path: Path | None, as_json: bool) -> None:
    """Write a commented corral.toml, by default in the current folder; an existing file stays as it is."""
    target = (path or Path(os.environ.get("CORRAL_CONFIG") or "corral.toml")).absolute()
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # the file may later contain secrets
    except FileExistsError:
        raise click.ClickException(f"{target} exists and was left as it is") from None
    except OSError as error:
        raise click.ClickException(f"{target}: {error.strerror}") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(sample())
    except OSError as error:  # for example a full disk: the next run would not replace a partial file
        target.unlink()
        raise click.ClickException(f"{target}: {error.strerror}") from None
    output.value({"path": str(target)}, as_json=as_json, text=f"Wrote {target}; everything in it is commented out.")
