"""The command `corral events`, which prints a server's latest events and, with `--follow`, new events as they occur."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.server_connection import client_command

BEHIND_THE_END = 10**17  # a position that no log reaches: the response is empty and names the end of the log
SPAN, MAX_SPAN = 20_000, 1_000_000  # positions that are searched for the last events
FAMILY_COLOURS = {"failed": "red", "completed": "green", "waiting": "yellow", "alert": "red", "error": "red"}


@click.command("events")
@click.option("--follow", is_flag=True, help="print new events as they happen, until Ctrl-C is pressed")
@click.option(
    "--type",
    "--event",  # as other commands call it
    "types",
    multiple=True,
    metavar="TYPE",
    help="print only events of this type, such as task.completed or task.*; repeatable",
)
@click.option(
    "--limit",
    type=click.IntRange(0, 1000),
    default=20,
    show_default=True,
    help="maximum number of past events to print",
)
@client_command
def events_command(client: ApiClient, *, follow: bool, types: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Print the latest events, oldest first. With --json, print each event as one line."""
    query: dict[str, Any] = {"types": list(types)} if types else {}
    end = client.get("/events", **query, after=BEHIND_THE_END)["next"]
    for event in _last_events(client, query, int(end), limit):
        _print_event(event, as_json=as_json)
    if follow:
        try:
            with client.waiting_out_outages(lambda why: click.echo(f"corral: {why}", err=True)):
                for event in client.follow_events(**query, after=end):
                    _print_event(event, as_json=as_json)
        except KeyboardInterrupt:
            click.echo()


def _last_events(client: ApiClient, query: Mapping[str, Any], end: int, limit: int) -> deque[Any]:
    """Return the last `limit` matching events up to the position `end`.

    Some events may not match, and some may be hidden from the caller. The search therefore begins near the end, and
    goes further back until it has found enough events or has covered `MAX_SPAN` positions.
    """
    span = SPAN if query else limit
    found = _events_between(client, query, max(0, end - span), end, limit)
    while len(found) < limit and span < min(end, MAX_SPAN):
        span *= 10
        found = _events_between(client, query, max(0, end - span), end, limit)
    return found


def _events_between(client: ApiClient, query: Mapping[str, Any], after: int, end: int, limit: int) -> deque[Any]:
    """Return the last `limit` matching events after the position `after` and up to the position `end`."""
    found: deque[Any] = deque(maxlen=limit)
    while limit and after < end:
        try:
            page = client.get("/events", **query, after=after, limit=200)
        except ApiClientError as error:
            if error.code != "cursor_expired":
                raise
            after = int(error.problem["oldest_seq"]) - 1
            continue
        found.extend(item for item in page["items"] if item["seq"] <= end)
        after = int(page["next"])
    return found


def _print_event(event: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(event, ensure_ascii=False))
        return
    when = click.style(event["ts"], dim=True)
    colour = FAMILY_COLOURS.get(event["event"].rpartition(".")[2])
    facts = " ".join(
        f"{name}={_shorten(value)}" for name, value in event["data"].items() if value not in (None, "", [], {})
    )
    click.echo(f"{when}  {click.style(event['event'], fg=colour, bold=True)}  {facts}")


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    text = text if len(text) <= 80 else text[:79] + "…"
    return json.dumps(text, ensure_ascii=False) if " " in text else text
