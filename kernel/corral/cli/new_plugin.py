"""The command `corral new-plugin`: writes the distribution of a new plugin."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from corral.cli import output
from corral.cli.output import json_option
from corral.config.reader import load as load_config


@click.command("new-plugin")
@click.argument("name")
@click.option("--dir", "parent", type=click.Path(file_okay=False, path_type=Path), help="where (default: here)")
@json_option
def command(name: str, parent: Path | None, as_json: bool) -> None:
    """Write corral-NAME/, a distribution that passes lint, types, tests and `corral check` as it is."""
    from corral.plugins.discovery import discover

    scaffold = importlib.import_module("corral.scaffold.write")  # in an outer ring: imported by name
    try:
        words = scaffold.names(name)
    except scaffold.BadName as error:
        raise click.UsageError(str(error)) from None
    if words["name"] in {found.name for found in discover(load_config())}:
        raise click.ClickException(f"a plugin {words['name']} is installed already; choose another name")
    folder = (parent or Path()).absolute() / f"corral-{words['hyphenated']}"
    try:
        written = scaffold.write(name, folder)
    except FileExistsError:
        raise click.ClickException(f"{folder} exists and was left as it is") from None
    except OSError as error:
        raise click.ClickException(f"{folder}: {error.strerror}") from None
    steps = [f"pip install -e {folder}", f"corral check {words['name']}", f"corral plugins enable {words['name']}"]
    text = "\n".join([f"Wrote {len(written)} files to {folder}. Next:", *(f"  {step}" for step in steps)])
    output.value({"folder": str(folder), "files": [str(path) for path in written]}, as_json=as_json, text=text)
