"""The `corral webhooks` commands, which manage webhooks and their deliveries from a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames, newest_id
from corral.cli.output import format_ms, print_fields, print_table, print_value, warnings_in_words
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command, complete_names
from corral.cli.status_parts import read_if_allowed
from corral.ids import parse_id
from corral_core.accounts.api import USERS_PATH

COLUMNS = ("url", "events", "active", "pending_deliveries", "last_status_code", "last_success_at", "id")
ALL_COLUMNS = ("host", "owner", "active", "pending_deliveries", "failing_since", "id")
DELIVERY_COLUMNS = ("created_at", "event", "status", "attempt", "result", "next_attempt_at", "id")
STATUSES = ("pending", "retrying", "succeeded", "failed", "cancelled")

webhook_argument = click.argument("webhook", shell_complete=complete_names("/webhooks", "host"))
delivery_argument = click.argument("delivery")
secret_option = click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="file that contains the secret (default: a secret is generated)",
)


@click.group("webhooks")
def webhooks_command_group() -> None:
    """Manage webhooks, which send events to other systems. WEBHOOK is the id, URL or host of a webhook."""


@webhooks_command_group.command("list")
@click.option("--all", "everybodys", is_flag=True, help="list the webhooks of all users, without details (admins only)")
@click.option("--active/--inactive", default=None, help="list only active or only disabled webhooks")
@client_command
def list_webhooks(client: ApiClient, *, everybodys: bool, active: bool | None, as_json: bool) -> None:
    """List webhooks, newest first."""
    query: dict[str, Any] = {"all": "true"} if everybodys else {}
    names = ObjectNames(client)
    if active is not None:
        query["is_active"] = "true" if active else "false"
    print_table(
        list(client.pages("/webhooks", **query)),
        ALL_COLUMNS if everybodys else COLUMNS,
        as_json=as_json,
        empty="There are no such webhooks. Create one: corral webhooks create URL --event EVENT",
        computed={
            "active": _state,
            "events": lambda row: " ".join(row["events"] or ()),
            "owner": lambda row: names.user(USERS_PATH, row["user_id"]),
        },
    )


@webhooks_command_group.command("show")
@webhook_argument
@client_command
def show_webhook(client: ApiClient, *, webhook: str, as_json: bool) -> None:
    """Show a webhook."""
    found = _find(client, webhook)
    shown = {
        "URL": found["url"],
        "id": found["id"],
        "description": found["description"],
        "events": " ".join(found["events"]),
        "filter": json.dumps(found["filter"]) if found["filter"] else None,
        "headers": " ".join(found["headers"]),
        "active": _state(found),
        "open deliveries": found["pending_deliveries"],
        "last success": found["last_success_at"],
        "last status": found["last_status_code"],
        "failing since": found["failing_since"],
        "circuit breaker": None if as_json else _breaker_text(client, found["host"]),
    }
    print_fields(found, shown, as_json=as_json)


@webhooks_command_group.command("create")
@click.argument("url")
@body_option
@field_option
@click.option("--event", "events", multiple=True, help="event to send, such as task.completed, task.* or *; repeatable")
@click.option("--description", help="description of the webhook's purpose")
@secret_option
@client_command
def create_webhook(
    client: ApiClient,
    *,
    url: str,
    input_path: Path | None,
    fields: tuple[str, ...],
    events: tuple[str, ...],
    description: str | None,
    secret_file: Path | None,
    as_json: bool,
) -> None:
    """Create a webhook. The command prints the webhook's secret, which is not shown again.

    Other fields, such as filter and headers, can be set with --field or in a file.
    """
    body = {**read_body(input_path, fields), "url": url, **_read_secret(secret_file)}
    if events:
        body["events"] = list(events)
    if description is not None:
        body["description"] = description
    if "events" not in body:
        raise click.UsageError("use --event to name the events to send; `corral webhooks event-types` lists the events")
    made = client.post("/webhooks", body)
    lines = [f"Created {made['id']}.", f"Its secret, which is not shown again: {made['secret']}"]
    lines += warnings_in_words(made["warnings"])
    lines.append(f"Try it: corral webhooks test {made['id']}")
    print_value(made, as_json=as_json, text="\n".join(lines))


@webhooks_command_group.command("edit")
@webhook_argument
@body_option
@field_option
@click.option("--url", help="new URL of the webhook")
@click.option(
    "--event", "events", multiple=True, help="event to send; repeatable; the given events replace all existing ones"
)
@client_command
def edit_webhook(
    client: ApiClient,
    *,
    webhook: str,
    input_path: Path | None,
    fields: tuple[str, ...],
    url: str | None,
    events: tuple[str, ...],
    as_json: bool,
) -> None:
    """Change a webhook. Fields that are not given stay unchanged."""
    given = {"url": url, "events": list(events) or None}
    body = {**read_body(input_path, fields), **{name: value for name, value in given.items() if value is not None}}
    if not body:
        raise click.UsageError("nothing to change; give --url, --event, --input or --field")
    changed = client.send("PUT", f"/webhooks/{_id(client, webhook)}", body=body)
    print_value(changed, as_json=as_json, text=f"Changed {changed['id']}; it sends to {changed['url']}.")


@webhooks_command_group.command("delete")
@webhook_argument
@client_command
def delete_webhook(client: ApiClient, *, webhook: str, as_json: bool) -> None:
    """Delete a webhook. Its open deliveries are cancelled."""
    found = _id(client, webhook)
    client.send("DELETE", f"/webhooks/{found}")
    print_value({"id": found}, as_json=as_json, text=f"Deleted {found}.")


@webhooks_command_group.command("test")
@webhook_argument
@click.option("--event", help="event whose example data is sent (default: the test event webhook.test)")
@client_command
def test_webhook(client: ApiClient, *, webhook: str, event: str | None, as_json: bool) -> None:
    """Send a test message, and wait for the result. The exit status is 1 if the message was not delivered."""
    body, row = {} if event is None else {"event": event}, _find(client, webhook)
    found = client.post(f"/webhooks/{row['id']}/test", body)
    if found["delivered"]:
        text = f"Delivered: the receiver answered {found['status_code']} after {format_ms(found['duration_ms'])}."
    elif found["error"] == "circuit_open":
        text = f"Not sent: {_breaker_text(client, row['host']) or _open_breaker_text(row['host'])}"
    elif found["status_code"]:
        text = f"Not delivered to {row['url']}: the receiver answered {found['status_code']}."
    else:
        text = f"Not delivered to {row['url']}: {(found['response'] or found['error']).removeprefix('Not sent: ')}"
    answer = [found["response"]] if found["status_code"] and found["response"] else []
    print_value(found, as_json=as_json, text="\n".join([text, *answer]))
    if not row["is_active"]:
        told = f"the webhook is disabled and receives no events. Enable it: corral webhooks enable {row['id']}"
        click.echo(click.style("warning", fg="yellow") + f": {told}", err=True)
    if not found["delivered"]:
        raise SystemExit(1)


@webhooks_command_group.command("enable")
@webhook_argument
@client_command
def enable_webhook(client: ApiClient, *, webhook: str, as_json: bool) -> None:
    """Enable a webhook. To send the events that it missed, use `corral webhooks recover`."""
    changed = client.post(f"/webhooks/{_id(client, webhook)}/enable", {})
    print_value(changed, as_json=as_json, text=f"{changed['id']} is enabled.")


@webhooks_command_group.command("disable")
@webhook_argument
@client_command
def disable_webhook(client: ApiClient, *, webhook: str, as_json: bool) -> None:
    """Disable a webhook. Its open deliveries are cancelled. Admins can also disable other users' webhooks by id."""
    found = parse_id(webhook) or _id(client, webhook)
    changed = client.post(f"/webhooks/{found}/disable", {})
    print_value(changed, as_json=as_json, text=f"{changed['id']} is disabled.")


@webhooks_command_group.command("rotate-secret")
@webhook_argument
@click.option(
    "--overlap",
    type=click.IntRange(0, 259_200),
    default=86_400,
    show_default=True,
    metavar="SECONDS",
    help="time in seconds during which deliveries are also signed with the old secret",
)
@secret_option
@client_command
def rotate_secret(client: ApiClient, *, webhook: str, overlap: int, secret_file: Path | None, as_json: bool) -> None:
    """Replace the secret of a webhook. The command prints the new secret, which is not shown again."""
    body = {"overlap_seconds": overlap, **_read_secret(secret_file)}
    found = client.post(f"/webhooks/{_id(client, webhook)}/rotate-secret", body)
    lines = [f"Its secret, which is not shown again: {found['secret']}"]
    if found["old_until"] is not None:
        lines.append(f"Until {found['old_until']}, deliveries are also signed with the old secret.")
    print_value(found, as_json=as_json, text="\n".join(lines))


@webhooks_command_group.command("deliveries")
@webhook_argument
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only deliveries with this status")
@click.option("--event", "events", multiple=True, help="list only deliveries of this event; repeatable")
@click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="maximum number of deliveries to list"
)
@client_command
def list_deliveries(
    client: ApiClient, *, webhook: str, status: tuple[str, ...], events: tuple[str, ...], limit: int, as_json: bool
) -> None:
    """List the deliveries to a webhook, newest first."""
    row = _find(client, webhook)
    items = client.get(f"/webhooks/{row['id']}/deliveries", status=list(status), event=list(events), limit=limit)[
        "items"
    ]
    is_waiting = not as_json and any(item["finished_at"] is None for item in items)
    held = _breaker_text(client, row["host"]) if is_waiting else None
    print_table(
        items,
        DELIVERY_COLUMNS,
        as_json=as_json,
        empty="There are no such deliveries.",
        colour_of="status",
        computed={
            "result": _result,
            "next_attempt_at": lambda item: (
                "waits for the breaker" if held and item["finished_at"] is None else item["next_attempt_at"]
            ),
        },
    )
    if held:
        click.echo(f"Open deliveries wait: {held}", err=True)


@webhooks_command_group.command("delivery")
@webhook_argument
@delivery_argument
@client_command
def show_delivery(client: ApiClient, *, webhook: str, delivery: str, as_json: bool) -> None:
    """Show a delivery with its payload and attempts.

    DELIVERY is an id, or an event name that stands for the newest delivery of that event.
    """
    row = _find(client, webhook)
    delivery = _delivery_id(client, webhook, row["id"], delivery)
    with _explain_not_found(client, webhook, delivery):
        found = client.get(f"/webhooks/{row['id']}/deliveries/{delivery}")
    attempts = [
        f"{each['n']}. {each['at']}  {_result(each)}  {format_ms(each['duration_ms'])}" for each in found["attempts"]
    ]
    shown = {
        "id": found["id"],
        "event": found["event"],
        "status": found["status"],
        "attempts": attempts,
        "next attempt": found["next_attempt_at"],
        "held back": None if as_json or found["finished_at"] else _breaker_text(client, row["host"]),
        "payload": json.dumps(found["payload"], ensure_ascii=False),
    }
    print_fields(found, shown, as_json=as_json)


@webhooks_command_group.command("redeliver")
@webhook_argument
@delivery_argument
@client_command
def redeliver(client: ApiClient, *, webhook: str, delivery: str, as_json: bool) -> None:
    """Resend a delivery under the same id.

    DELIVERY is an id, or an event name that stands for the newest delivery of that event.
    """
    found = _find(client, webhook)
    delivery = _delivery_id(client, webhook, found["id"], delivery)
    try:
        with _explain_not_found(client, webhook, delivery):
            row = client.post(f"/webhooks/{found['id']}/deliveries/{delivery}/redeliver", {})
    except ApiClientError as error:  # it waits already: say for what
        cause = _breaker_text(client, found["host"]) if error.code == "invalid_state" else None
        raise ApiClientError(f"{error}: {cause}", error.status, error.problem) if cause else error from None
    held = None if as_json else _breaker_text(client, found["host"])
    print_value(row, as_json=as_json, text=f"{row['id']} {f'waits: {held}' if held else 'is sent again.'}")


@webhooks_command_group.command("recover")
@webhook_argument
@click.option("--since", metavar="INSTANT", help="resend deliveries since this time, such as 2026-01-31T09:30:00Z")
@click.option(
    "--hours", type=click.IntRange(1, 336), help="number of past hours whose deliveries are resent (default: 24)"
)
@client_command
def recover(client: ApiClient, *, webhook: str, since: str | None, hours: int | None, as_json: bool) -> None:
    """Resend the failed and cancelled deliveries from the given period."""
    if since is not None and hours is not None:
        raise click.UsageError("--since and --hours cannot be used together")
    begin = since or (datetime.now(UTC) - timedelta(hours=hours or 24)).isoformat(timespec="seconds")
    found = client.post(f"/webhooks/{_id(client, webhook)}/recover", {"since": begin})
    print_value(found, as_json=as_json, text=f"Deliveries that are sent again: {found['queued']}")


@webhooks_command_group.command("event-types")
@client_command
def list_event_types(client: ApiClient, *, as_json: bool) -> None:
    """List the events that your webhooks can receive."""
    print_table(client.get("/webhooks/event-types")["items"], ("event", "title"), as_json=as_json)


def _find(client: ApiClient, name: str) -> Any:
    """Return the webhook with this id, URL or host. Fail unless there is exactly one."""
    if parse_id(name) is not None:
        return client.get(f"/webhooks/{name}")
    same = [row for row in client.pages("/webhooks") if name in (row["url"], row["host"])]
    if len(same) == 1:
        return same[0]
    if same:
        ids = ", ".join(row["id"] for row in same)
        raise ApiClientError(f"{len(same)} webhooks have the URL or host {name}; give one of these ids instead: {ids}")
    raise ApiClientError(f"no webhook has the URL or host {name}; `corral webhooks list` shows all webhooks", 404)


def _id(client: ApiClient, name: str) -> str:
    return str(_find(client, name)["id"])


def _delivery_id(client: ApiClient, webhook: str, webhook_id: str, delivery: str) -> str:
    """Return the given delivery id, or the id of the newest delivery of the event with this name."""
    return newest_id(
        client,
        f"/webhooks/{webhook_id}/deliveries",
        delivery,
        kind="delivery",
        titles=lambda row: [row["event"]],
        listing=f"corral webhooks deliveries {webhook}",
    )


def _explain_not_found(client: ApiClient, webhook: str, delivery: str) -> AbstractContextManager[None]:
    return client.explain_not_found("delivery", delivery, f"corral webhooks deliveries {webhook}")


def _breaker_text(client: ApiClient, host: str) -> str | None:
    """Describe the open circuit breaker of a host and how to close it, or return None if it is closed.

    Also return None for users who are not admins, because they cannot see circuit breakers.
    """
    path = f"/circuit-breakers/{quote(_breaker_name(host), safe='')}"
    found = read_if_allowed(client, path, needs="circuit_breakers.read")
    if found is None or found["state"] == "closed":
        return None
    reason = found["reason"].rstrip(".")
    if found["forced"]:
        told = f"the circuit breaker {found['name']} is forced open ({reason})"
    elif found["state"] == "open":
        told = f"the circuit breaker {found['name']} is open until {found['retry_at']} ({reason})"
    else:
        told = f"the circuit breaker {found['name']} is half-open and lets a few attempts pass ({reason})"
    return f"{told}. Close it at once: corral circuit-breakers force-close {found['name']}"


def _open_breaker_text(host: str) -> str:
    breaker = _breaker_name(host)
    return (
        f"the circuit breaker {breaker} is open, because attempts to this host failed. It tries again by itself; "
        f"an admin can close it: corral circuit-breakers force-close {breaker}"
    )


def _breaker_name(host: str) -> str:
    return f"webhook:{host}"


def _state(row: Mapping[str, Any]) -> str:
    return "yes" if row["is_active"] else row["disabled_reason"] or "no"


def _result(row: Mapping[str, Any]) -> str:
    """Return the status code of the response, or the reason why there was no response."""
    return str(row["status_code"] or row["error"] or "-")


def _read_secret(path: Path | None) -> dict[str, str]:
    return {} if path is None else {"secret": path.read_text("utf-8").strip()}
