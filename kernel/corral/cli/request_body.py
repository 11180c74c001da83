"""The options `--field` and `--input`, through which commands accept a request body."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

SECRET_NAME = re.compile(r"password|passphrase|secret|token|code|private_key|(?:^|_)key$|^value$")
"""Matches the names of fields that contain secrets.

The name `value` is included because a field of this name contains a vault secret or the value of a setting, which may
be secret.
"""

field_option = click.option(
    "-f",
    "--field",
    "fields",
    multiple=True,
    metavar="KEY=VALUE",
    help="field to set: KEY=TEXT, KEY=@FILE to read the text from a file (@- reads standard input or, on a terminal, "
    'prompts without echo), or KEY:=JSON for a JSON value such as true, 3 or ["a"]; repeatable',
)
body_option = click.option(
    "--input",
    "input_path",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="file that contains a JSON object with further fields, or - for standard input",
)


def parse_fields(fields: tuple[str, ...]) -> dict[str, Any]:
    """Convert `KEY=VALUE`, `KEY=@FILE` and `KEY:=JSON` to a dictionary. A repeated key becomes a list.

    Text from a file is kept unchanged, except that line breaks at the end of a secret are removed, because editors add
    them. On a terminal, `KEY=@-` prompts for one line without echo, so that passwords and codes can be entered safely.
    """
    values: dict[str, Any] = {}
    for item in fields:
        key, mark, text = item.partition("=")
        if not mark or not key.rstrip(":"):
            raise click.BadParameter(f"{item!r} does not have the form KEY=VALUE or KEY:=VALUE")
        value: Any = text
        if key.endswith(":"):
            key = key[:-1]
            try:
                value = json.loads(text)
            except ValueError as error:
                raise click.BadParameter(f"{item!r}: the value is not JSON: {error}") from None
        elif text == "@-" and sys.stdin.isatty():
            value = click.prompt(key.replace("_", " ").capitalize(), hide_input=True, err=True)
        elif text.startswith("@"):
            value = _read(Path(text[1:])).decode("utf-8", "replace")
            if SECRET_NAME.search(key):
                value = value.rstrip("\r\n")
        if key in values:
            before = values[key]
            value = [*before, value] if isinstance(before, list) else [before, value]
        values[key] = value
    return values


def read_body(input_path: Path | None, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON object in the file, with the fields added to it."""
    value: Any = {}
    if input_path is not None:
        try:
            value = json.loads(_read(input_path))
        except ValueError as error:
            raise click.UsageError(f"--input {input_path}: the content is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise click.UsageError(f"--input {input_path}: the content is not a JSON object")
    return {**value, **parse_fields(fields)}


def _read(path: Path) -> bytes:
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
