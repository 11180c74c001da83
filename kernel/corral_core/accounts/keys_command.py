"""`corral keys`: a new master key to configure, and a new key that signs access tokens."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

import click

from corral.cli import output
from corral.cli.kernels import session
from corral.cli.options import config_option, json_option


@click.group("keys")
def command() -> None:
    """Keys of this installation."""


@command.command("generate")
@click.option("--label", default="v1", show_default=True, help="its name: letters and digits, new for each key")
@json_option
def generate(label: str, as_json: bool) -> None:
    """Print a new master key. Put it first in CORRAL_MASTER_KEY, before the keys that are there; nothing is changed."""
    if not (label.isascii() and label.isalnum()):
        raise click.UsageError("--label takes letters and digits only")
    text = f"{label}:{base64.b64encode(secrets.token_bytes(32)).decode()}"
    output.value({"master_key": text}, as_json=as_json, text=text)


@command.command("rotate-jwt")
@config_option
@json_option
def rotate_jwt(config_path: Path | None, as_json: bool) -> None:
    """Sign access tokens with a new key. The old one verifies until its last token is over; nobody is signed out."""
    from corral_core.accounts.service.signing_keys import SigningKeys

    with session(config_path, "keys rotate-jwt") as found:
        kid = found.run(found.service(SigningKeys).rotate)
    output.value({"key": kid}, as_json=as_json, text=f"A new key signs access tokens within a minute: {kid}.")
