"""`corral run`: creates a task for an agent and follows its progress."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.server_connection import client_command
from corral_plugins.tasks.commands.following import EventPrinter, follow_task
from corral_plugins.tasks.commands.task_options import (
    agent_option,
    create_task,
    input_option,
    print_warnings,
    read_input,
    require_tool_option,
)


@click.command("run")
@agent_option
@input_option
@require_tool_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="stop following the task after this many seconds (default: follow the task to its end)",
)
@click.argument("instructions")
@client_command
def run_task_command(
    client: ApiClient,
    *,
    agent: str,
    input_path: Path | None,
    required_tools: tuple[str, ...],
    timeout: float | None,
    as_json: bool,
    instructions: str,
) -> None:
    """Create a task for an agent, follow it, and print its result.

    The exit code is 0 only if the task is completed. Ctrl-C and --timeout stop following the task but do not cancel it.
    """
    named = {"required_tools": list(required_tools)} if required_tools else {}
    task = create_task(client, agent, instructions, read_input(input_path), **named)
    printer = EventPrinter(quiet=as_json)
    printer.line("created", task["id"])
    if not as_json:
        with contextlib.suppress(ApiClientError):  # `follow_task` meets and reports the same error
            print_warnings(client, task["id"], obstacles=False)  # they are shown while they keep the task waiting
    follow_task(client, task["id"], printer, timeout=timeout, as_json=as_json)
