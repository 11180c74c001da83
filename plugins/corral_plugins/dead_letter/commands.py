"""The command group `corral dead-letter`, which shows, retries and discards dead letters."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames
from corral.cli.output import format_ms, print_fields, print_table, print_value
from corral.cli.request_body import field_option, parse_fields
from corral.cli.server_connection import client_command, complete_names
from corral.ids import parse_id

PATH = "/dead-letter"
REASONS = ("max_attempts", "crash_loop", "non_retryable", "expired", "budget", "manual")
COLUMNS = ("created_at", "title", "reason", "error_type", "retry_count", "status", "id")
POLL_SECONDS = 1.0

letter_argument = click.argument("letter", shell_complete=complete_names(PATH, "title"))
reason_option = click.option("--reason", type=click.Choice(REASONS), help="include only dead letters with this reason")


@click.group("dead-letter")
def dead_letter_command_group() -> None:
    """Show, retry and discard dead letters, which represent tasks that failed for good.

    LETTER is the id of a dead letter, or the title or id of its task.
    """


@dead_letter_command_group.command("list")
@click.option(
    "--status",
    type=click.Choice(("open", "retried", "discarded", "all")),
    default="open",
    show_default=True,
    help="list only dead letters in this state",
)
@reason_option
@click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="maximum number of dead letters to list"
)
@client_command
def list_letters(client: ApiClient, *, status: str, reason: str | None, limit: int, as_json: bool) -> None:
    """List the newest dead letters."""
    query = {"status": status, "limit": limit, **({"reason": reason} if reason is not None else {})}
    print_table(
        client.get(PATH, **query)["items"],
        COLUMNS,
        as_json=as_json,
        empty="There are no such dead letters.",
        colour_of="status",
    )


@dead_letter_command_group.command("show")
@letter_argument
@client_command
def show_letter(client: ApiClient, *, letter: str, as_json: bool) -> None:
    """Show a dead letter with the errors of its attempts."""
    found, names = client.get(f"{PATH}/{_letter_id(client, letter)}"), ObjectNames(client)
    shown = {
        "title": found["title"],
        "id": found["id"],
        "task": found["task_id"],
        "status": found["status"],
        "reason": found["reason"],
        "error": f"{found['error_type']}: {found['error_message']}",
        "agent": names.name("/agents", found["agent_id"]) if found["agent_id"] else None,
        "failed": found["created_at"],
        "first failed": found["first_failed_at"],
        "retries": found["retry_count"],
        "note": found["note"],
        "attempts": [_attempt_text(each) for each in found["attempts"]],
    }
    print_fields(found, shown, as_json=as_json)


@dead_letter_command_group.command("retry")
@letter_argument
@click.option("--from-start", is_flag=True, help="start the task from the beginning, not from its last checkpoint")
@field_option
@client_command
def retry_letter(client: ApiClient, *, letter: str, from_start: bool, fields: tuple[str, ...], as_json: bool) -> None:
    """Retry the task of a dead letter. --field changes a field of the task, for example --field priority=high."""
    body: dict[str, Any] = {"from_checkpoint": not from_start}
    if fields:
        body["overrides"] = parse_fields(fields)
    retried = client.post(f"{PATH}/{_letter_id(client, letter)}/retry", body)
    text = f"The task {retried['title']} ({retried['task_id']}) is {retried['task']['status']}."
    print_value(retried, as_json=as_json, text=text)


@dead_letter_command_group.command("retry-all")
@reason_option
@click.option(
    "--max",
    "most",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="maximum number of tasks to retry",
)
@click.option("--rate", type=click.IntRange(1, 50), help="number of tasks to retry per second")
@click.option("--wait", is_flag=True, help="wait until the batch of retries has ended")
@client_command
def retry_all_letters(
    client: ApiClient, *, reason: str | None, most: int, rate: int | None, wait: bool, as_json: bool
) -> None:
    """Start a batch that retries the open dead letters, oldest first."""
    chosen = {} if reason is None else {"reason": reason}
    batch = client.post(f"{PATH}/retry-all", {"filter": chosen, "max": most, "rate_per_second": rate})
    with client.waiting_out_outages(lambda reason: click.echo(f"corral: {reason}", err=True)):
        while wait and batch["status"] == "running":
            time.sleep(POLL_SECONDS)
            batch = client.get(f"{PATH}/batches/{batch['id']}")
    told = f"Batch {batch['id']} is {batch['status']}: {batch['requeued']} of {batch['matched']} tasks retried"
    print_value(batch, as_json=as_json, text=f"{told}, {len(batch['skipped'])} skipped.")


@dead_letter_command_group.command("discard")
@letter_argument
@client_command
def discard_letter(client: ApiClient, *, letter: str, as_json: bool) -> None:
    """Discard a dead letter. Its task stays failed."""
    found = _letter_id(client, letter)
    client.send("DELETE", f"{PATH}/{found}")
    print_value({"id": found, "status": "discarded"}, as_json=as_json, text=f"Discarded {letter}.")


@dead_letter_command_group.command("stats")
@client_command
def show_stats(client: ApiClient, *, as_json: bool) -> None:
    """Show the number of dead letters, and why the tasks failed."""
    found = client.get(f"{PATH}/stats")
    rate = found["retry_success_rate"]
    shown = {
        "open": found["total"],
        **{f"because of {reason}": count for reason, count in found["by_reason"].items() if count},
        "oldest": format_ms(found["oldest_age_ms"]),
        "added in the last hour": found["added_1h"],
        "added in the last 24 hours": found["added_24h"],
        "retried in the last 24 hours": found["retried_24h"],
        "completed after a retry": None if rate is None else f"{rate:.0%}",
    }
    print_fields(found, shown, as_json=as_json)


def _letter_id(client: ApiClient, letter: str) -> str:
    """Return the id of the dead letter that `letter` identifies by its own id, or by the title or id of its task.

    If a task has several dead letters, return the id of the newest one.
    """
    if parse_id(letter) is None:
        found = _letters_of(client, letter, lambda each: each["title"].casefold() == letter.strip().casefold())
    else:
        try:
            return str(client.get(f"{PATH}/{letter}")["id"])
        except ApiClientError as error:
            if error.status != 404:
                raise
        task = ObjectNames(client).read(f"/tasks/{letter}")
        found = _letters_of(client, task["title"], lambda each: each["task_id"] == letter) if task else []
    if not found:
        problem = f"there is no dead letter for {letter} at {client.url}"
        raise ApiClientError(f"{problem}; `corral dead-letter list --status all` shows all dead letters", 404)
    if len({each["task_id"] for each in found}) > 1:
        ids = ", ".join(each["id"] for each in found)
        raise ApiClientError(f"{len(found)} dead letters have the title {letter}; give one of these ids instead: {ids}")
    return str(found[0]["id"])


def _letters_of(client: ApiClient, title: str, is_meant: Callable[[Any], bool]) -> list[Any]:
    """Return the open dead letters that a search for `title` finds and that satisfy `is_meant`, newest first.

    If none are open, return the closed ones.
    """
    found = [each for each in client.get(PATH, search=title, status="all", limit=200)["items"] if is_meant(each)]
    return [each for each in found if each["status"] == "open"] or found


def _attempt_text(attempt: Any) -> str:
    error = attempt["error"] or {}
    return f"{attempt['n']}: {error.get('type', '-')}: {error.get('message', '')}"
