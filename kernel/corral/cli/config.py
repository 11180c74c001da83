"""The `corral config` command, which shows or checks the configuration, or writes a commented configuration file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from corral.cli import output
from corral.cli.commands import FAILED, REFUSED
from corral.cli.masked_config import masked_rows
from corral.cli.output import config_option, json_option
from corral.cli.plugins import reason_in_words
from corral.cli.unknown_settings import unknown_setting_warnings
from corral.config.model import TABLE
from corral.config.reader import load as load_config


@click.group("config")
def config_command() -> None:
    """Show, check or write the configuration."""


@config_command.command("show")
@click.argument("prefix", required=False, default="")
@config_option
@json_option
def show_config(prefix: str, config_path: Path | None, as_json: bool) -> None:
    """Show the effective value of every key and its source. Secrets are masked.

    PREFIX limits the output to one section or key, such as server or database.url.
    """
    config = load_config(path=config_path)
    rows = [
        {"key": row.key, "value": row.value, "source": row.source, "about": row.doc, "secret": row.secret}
        for row in masked_rows(config)
        if row.key == prefix or row.key.startswith(f"{prefix}." if prefix else "")
    ]
    if prefix and not rows:
        raise click.UsageError(
            f"{prefix} is neither a section nor a key of the configuration; `corral config show` lists all keys"
        )
    if not as_json:
        click.echo(f"file: {config.path or 'none'}", err=True)
    output.print_table(rows, ("key", "value", "source"), as_json=as_json)  # about: only in JSON, and in `config init`


@config_command.command("check")
@config_option
@json_option
def check(config_path: Path | None, as_json: bool) -> None:
    """Check the configuration file, environment variables, plugin sections and pinned settings.

    The command changes nothing. The exit status is 3 if the server would not start, and 1 if it would start without one
    of its plugins.
    """
    from corral.cli.command_kernels import temporary_kernel

    config = load_config(path=config_path)
    rows: list[dict[str, Any]] = [{"status": "warning", "detail": warning} for warning in config.warnings]
    with temporary_kernel(config) as kernel:
        kernel.refuse_without_essentials()
        rows += [
            {"status": "warning", "detail": warning} for warning in unknown_setting_warnings(config, kernel.settings)
        ]
        for item in kernel.plugins:
            if item.state in ("failed", "blocked"):
                rows.append({"status": "failed", "detail": f"plugin {item.name} is {item.state}: {item.reason}"})
        known = {item.name for item in kernel.plugins}
        rows += [
            {
                "status": "warning",
                "detail": f"the section [plugins.{item.name}] is ignored, because the plugin {item.name} is "
                f"{reason_in_words(item.name, item.reason)}",
            }
            for item in kernel.plugins
            if item.state == "disabled" and item.name in config.plugins.tables
        ]
    for key, names in (("enabled", config.plugins.enabled), ("disabled", config.plugins.disabled)):
        rows += [
            {"status": "warning", "detail": f"plugins.{key} lists {name}, but no plugin {name} is installed"}
            for name in names
            if name not in known
        ]
    rows += [
        {"status": "warning", "detail": f"there is a section [plugins.{name}], but no plugin {name} is installed"}
        for name in config.plugins.tables
        if name not in known
    ]
    file = f"The configuration is valid ({config.path or 'no file, only defaults and environment variables'})."
    output.print_table(rows, ("status", "detail"), as_json=as_json, empty=file, colour_of="status")
    if any(row["status"] == "failed" for row in rows):
        sys.exit(REFUSED if config.plugins.strict else FAILED)


@config_command.command("init")
@click.argument("path", required=False, type=click.Path(dir_okay=False, path_type=Path))
@json_option
def init(path: Path | None, as_json: bool) -> None:
    """Write a corral.toml in which every key is explained and commented out.

    PATH defaults to corral.toml in the current folder. The command never changes an existing file.
    """
    target = (path or Path(os.environ.get("CORRAL_CONFIG") or "corral.toml")).absolute()
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # the file may later contain secrets
    except FileExistsError:
        raise click.ClickException(f"{target} already exists and was not changed; choose another path") from None
    except OSError as error:
        raise click.ClickException(f"cannot write {target}: {error.strerror}") from None
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(sample())
    except OSError as error:  # for example a full disk: the next run would not replace a partial file
        target.unlink()
        raise click.ClickException(f"cannot write {target}: {error.strerror}") from None
    output.print_value(
        {"path": str(target)}, as_json=as_json, text=f"Wrote {target}. Every key in it is commented out."
    )


_SAMPLE_HEAD = """\
# The command line and environment variables take precedence over this file.
# A value can contain a variable, ${NAME}, or be read from a file, file:/path."""


_EXAMPLES: dict[str, Any] = {
    "server.public_url": "https://corral.example.org",
    "server.certfile": "/etc/corral/tls.crt",
    "server.keyfile": "/etc/corral/tls.key",
    "database.url": "postgresql://localhost/corral",
    "database.migrate_on_start": True,
    "redis.url": "redis://localhost:6379/0",
    "storage.url": "s3://bucket",
    "egress.proxy": "http://proxy.example.org:3128",
    "plugins.dir": "/srv/corral-plugins",
    "bootstrap_admin_email": "me@example.org",
    "local_model": "/srv/model.gguf",
}
"""Example values in the sample file, for keys whose default values do not make clear how to use them."""


def sample() -> str:
    """Return a sample `corral.toml` in which every key is explained and commented out."""
    lines = [_SAMPLE_HEAD]
    here = ""
    for name, entry in TABLE.items():
        section, _, field = name.rpartition(".")
        if section != here:
            lines += ["", f"[{section}]"]
            here = section
        value = f"file:/run/secrets/{field}" if entry.key.secret else _EXAMPLES.get(name, entry.default)
        variable = f" ({entry.key.variable})" if entry.key.variable else ""
        shown = json.dumps(value, default=str)
        lines += [f"# {entry.key.doc}{variable}", f"# {field} = {shown}"]
    return "\n".join([*lines, "", "[settings]", "# Pins a run-time setting", '# "events.retention_days" = 30', ""])
