"""Follows a workflow run in the terminal until it has ended."""

from __future__ import annotations

import sys
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral_plugins.workflows.wait_reasons import task_obstacles

ENDED = ("completed", "failed", "cancelled")


def follow_run(client: ApiClient, run: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Print the events of a run to standard error until it has ended, and return the run.

    Ctrl-C ends the command with the exit status 130, but the run continues. Raise `ApiClientError` if the run cannot be
    followed any longer.
    """
    command = f"corral workflows watch {run['id']}"
    try:
        with client.waiting_out_outages(lambda reason: click.echo(f"  {reason}", err=True)):
            return _print_events(client, run, quiet=quiet)
    except KeyboardInterrupt:
        click.echo(f"\nThe run continues. Follow it again: {command}", err=True)
        sys.exit(130)
    except ApiClientError as error:
        if error.status == 404:
            raise
        raise ApiClientError(
            f"{str(error).rstrip('.')}; the run continues; follow it with {command}", error.status, error.problem
        ) from None


def _print_events(client: ApiClient, run: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Print the events of a run until it has ended, and return the run.

    While there are no new events, print why tasks of the run's steps are not running. A reason is printed only once,
    and only if it is found in two consecutive checks, because every new task waits briefly.
    """
    after, run_id = "0", run["id"]
    told: set[tuple[str, str]] = set()
    before: dict[str, str] = {}
    while True:
        is_over = run["status"] in ENDED
        page = client.get(f"/workflow-runs/{run_id}/events", after=after, limit=200)
        after = page["next"]
        for event in page["items"] if not quiet else ():
            click.echo(_event_line(event), err=True)
        if is_over and len(page["items"]) < 200:
            return dict(run)
        if not page["items"]:
            run = client.get(f"/workflow-runs/{run_id}", wait=1)
            obstacles = {} if quiet else task_obstacles(client, run)
            lasting = [each for each in obstacles.items() if each in before.items() and each not in told]
            for name, why in lasting:
                click.echo(f"  {name} waits: {why}", err=True)
            told, before = told | set(lasting), obstacles
        elif not is_over:
            run = client.get(f"/workflow-runs/{run_id}")


def _event_line(event: dict[str, Any]) -> str:
    data = event["data"]
    if event["event"].startswith("workflow.run."):
        return f"run {event['event'].rpartition('.')[2]}"
    place = "".join(f"[{n}]" for n in data["iteration"])
    error = f": {data['error']['message']}" if data.get("error") else ""
    return f"  {data['step']}{place} {event['event'].rpartition('.')[2]}{error}"
