"""The options and arguments of commands that create a task."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClient
from corral.cli.server_connection import complete_names
from corral.cli.status_parts import read_if_allowed

INPUT_BYTES, TITLE_LENGTH = 256 * 1024, 200
MAX_OBSTACLES = 3
PASSING = ("dependencies", "available_at", "agent_capacity", "worker_capacity")
"""The claim conditions that can be met without any action by a user."""

agent_option = click.option(
    "--agent",
    required=True,
    metavar="NAME",
    help="name or id of the agent",
    shell_complete=complete_names("/agents"),
)
input_option = click.option(
    "--input",
    "input_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file that contains the input of the task: a JSON object or text",
)
require_tool_option = click.option(
    "--require-tool",
    "required_tools",
    multiple=True,
    metavar="TOOL",
    help="give the task only to a worker that offers this tool; repeatable",
)


def create_task(
    client: ApiClient, agent: str, instructions: str, task_input: dict[str, Any], **fields: Any
) -> dict[str, Any]:
    """Create a task for the agent with this name or id. The default `title` is the first line of the instructions."""
    for name, text in (("--agent", agent), ("INSTRUCTIONS", instructions)):
        if not text.strip():
            raise click.UsageError(f"{name} is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise click.UsageError(f"{name} is not UTF-8 text")
    found = client.find("/agents", agent, kind="agent")
    new = {"title": _title(instructions), "instructions": instructions, "input": task_input, "agent_id": found["id"]}
    return dict(client.post("/tasks", {**new, **fields}))


def print_warnings(client: ApiClient, task_id: str, *, obstacles: bool) -> None:
    """Print the warnings about a new task to standard error.

    With `obstacles`, also print the conditions that keep the task from running.
    """
    found = read_if_allowed(client, f"/tasks/{task_id}/explain") or {"conditions": [], "warnings": []}
    unmet = [each for each in found["conditions"] if obstacles and not each["ok"] and each["code"] not in PASSING]
    told = [" ".join(filter(None, (each["detail"], each["unblock"]))) for each in unmet[:MAX_OBSTACLES]]
    for warning in [*told, *found["warnings"]]:
        click.echo(f"{click.style('warning', fg='yellow')}: {warning}", err=True)


def _title(instructions: str) -> str:
    first = instructions.strip().splitlines()[0].strip()
    return first if len(first) <= TITLE_LENGTH else first[: TITLE_LENGTH - 1] + "…"


def read_input(path: Path | None) -> dict[str, Any]:
    """Return the JSON object that the file contains. Other content is returned as `{"text": …}`."""
    if path is None:
        return {}
    with path.open("rb") as file:
        data = file.read(INPUT_BYTES + 1)
    if len(data) > INPUT_BYTES:
        raise click.UsageError(f"--input {path}: the file is larger than {INPUT_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(f"--input {path}: the file is not UTF-8 text") from None
    value = _parsed(path, data)
    return value if isinstance(value, dict) else {"text": text}


def _parsed(path: Path, data: bytes) -> Any:
    """Return the JSON value in the file, or None if the content is not JSON.

    Raise `UsageError` for an ambiguous JSON object, for example one with duplicate keys.
    """
    from corral.errors import Problem
    from corral.schema.strict_json import parse_json

    try:
        return parse_json(data)
    except Problem as problem:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(data), dict):
                faults = [f"{fault.pointer}: {fault.detail}" for fault in problem.errors]
                raise click.UsageError(f"--input {path}: {'; '.join([problem.detail, *faults])}") from None
    return None
