"""The `corral new-plugin` command, which creates the source tree of a new plugin's distribution package."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from corral.cli import output
from corral.cli.output import json_option
from corral.config.reader import load as load_config


@click.command("new-plugin")
@click.argument("name")
@click.option(
    "--dir",
    "parent",
    type=click.Path(file_okay=False, path_type=Path),
    help="folder in which the plugin's folder is created (default: the current folder)",
)
@json_option
def new_plugin_command(name: str, parent: Path | None, as_json: bool) -> None:
    """Create the folder corral-NAME with the source tree of a new plugin.

    The source tree passes the linter, the type checks, its tests and `corral check` without changes.
    """
    from corral.plugins.discovery import discover

    scaffold = importlib.import_module("corral.scaffold.distribution")  # in an outer ring: imported by name
    try:
        values = scaffold.placeholder_values(name)
    except scaffold.InvalidPluginName as error:
        raise click.UsageError(str(error)) from None
    if values["name"] in {found.name for found in discover(load_config())}:
        raise click.ClickException(f"a plugin named {values['name']} is already installed; choose another name")
    folder = (parent or Path()).absolute() / f"corral-{values['hyphenated']}"
    try:
        written = scaffold.write_distribution(name, folder)
    except FileExistsError:
        raise click.ClickException(f"{folder} already exists and was not changed; choose another folder") from None
    except OSError as error:
        raise click.ClickException(f"cannot write to {folder}: {error.strerror}") from None
    steps = [f"pip install -e {folder}", f"corral check {values['name']}", f"corral plugins enable {values['name']}"]
    text = "\n".join([f"Wrote {len(written)} files to {folder}. Next:", *(f"  {step}" for step in steps)])
    output.print_value({"folder": str(folder), "files": [str(path) for path in written]}, as_json=as_json, text=text)
