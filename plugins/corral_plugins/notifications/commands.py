"""`corral notifications`: show the user's notifications, and manage channels and rules from a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from corral.cli.api_client import ApiClient, ApiClientError
from corral.cli.object_lookup import ObjectNames, newest_id
from corral.cli.output import format_ms, print_fields, print_table, print_value, warnings_in_words
from corral.cli.request_body import body_option, field_option, read_body
from corral.cli.server_connection import client_command, complete_names
from corral.ids import parse_id

COLUMNS = ("created_at", "severity", "title", "count", "read", "id")
CHANNEL_COLUMNS = ("name", "type", "enabled", "status", "last_success_at", "used_by", "id")
RULE_COLUMNS = ("name", "events", "min_severity", "channels", "enabled", "id")
DELIVERY_COLUMNS = ("title", "count", "channel", "rule", "status", "attempts", "next_attempt_at", "last_error", "id")
PREVIEW_COLUMNS = ("sent_at", "channel", "severity", "count", "group_key", "titles")
FAILURES = {
    "blocked": "the egress guard does not allow the address of the channel; the operator can allow it with "
    "CORRAL_EGRESS_ALLOW",
    "circuit_open": "the circuit breaker of the channel is open; `corral circuit-breakers list` says why",
}
STATUSES = ("pending", "retrying", "succeeded", "failed", "cancelled", "suppressed")

NAMED = {
    "agent": ("/agents", "name"),
    "approval": ("/approvals", "title"),
    "code_review": ("/code-reviews", "title"),
    "task": ("/tasks", "title"),
    "trigger": ("/triggers", "name"),
    "webhook": ("/webhooks", "host"),
    "worker": ("/workers", "name"),
    "workflow": ("/workflows", "name"),
}
"""The types of named objects in notifications, with their API paths and the fields that contain their names."""
MAX_TITLES = 10  # that a notification keeps
CHANNELS, RULES = "/notifications/channels", "/notifications/rules"
channel_argument = click.argument("channel", shell_complete=complete_names(CHANNELS, "name"))
notification_argument = click.argument("notification")
rule_argument = click.argument("rule", shell_complete=complete_names(RULES, "name"))
limit_option = click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="maximum number of entries to list"
)


@click.group("notifications")
def notifications_command_group() -> None:
    """Read your notifications, and manage channels and rules. CHANNEL and RULE are names or ids."""


@notifications_command_group.command("list")
@click.option("--unread", is_flag=True, help="list only unread notifications")
@limit_option
@client_command
def list_notifications(client: ApiClient, *, unread: bool, limit: int, as_json: bool) -> None:
    """List your notifications, newest first."""
    query: dict[str, Any] = {"unread": "true"} if unread else {}
    print_table(
        client.get("/notifications", limit=limit, **query)["items"],
        COLUMNS,
        as_json=as_json,
        empty="There are no such notifications.",
        computed={
            "title": lambda row: _title_text(row["title"], row["count"] if len(row["titles"]) > 1 else 1),
            "read": lambda row: "yes" if row["read_at"] else "no",
        },
    )


@notifications_command_group.command("show")
@notification_argument
@client_command
def show_notification(client: ApiClient, *, notification: str, as_json: bool) -> None:
    """Show a notification without marking it as read. NOTIFICATION is an id or a title.

    If several notifications have the title, the newest is shown.
    """
    notification = _notification_id(client, notification)
    with _explain_not_found(client, notification):
        found = client.get(f"/notifications/{notification}")
    shown = {
        "title": found["title"],
        "id": found["id"],
        "severity": found["severity"],
        "type": found["type"],
        "about": None if as_json else _about(client, found["object"]),
        "times": found["count"] if found["count"] > 1 else None,
        "all of them": _all_titles(found),
        "created": found["created_at"],
        "read": found["read_at"],
        "text": found["body"],
    }
    print_fields(found, shown, as_json=as_json)


@notifications_command_group.command("read")
@click.argument("notification", required=False)
@click.option("--all", "everything", is_flag=True, help="mark all notifications as read")
@client_command
def mark_read(client: ApiClient, *, notification: str | None, everything: bool, as_json: bool) -> None:
    """Mark one notification, or all of them, as read. NOTIFICATION is an id or a title.

    If several notifications have the title, the newest is marked.
    """
    if everything == (notification is not None):
        raise click.UsageError("give the id or the title of a notification, or --all")
    if everything:
        done = client.send("PUT", "/notifications/read-all", body={})
        print_value(done, as_json=as_json, text=f"Notifications that are read now: {done['updated']}")
        return
    notification = _notification_id(client, str(notification))
    with _explain_not_found(client, notification):
        row = client.send("PUT", f"/notifications/{notification}/read", body={})
    print_value(row, as_json=as_json, text=f"Read: {row['title']}")


@notifications_command_group.command("preferences")
@field_option
@client_command
def preferences(client: ApiClient, *, fields: tuple[str, ...], as_json: bool) -> None:
    """Show your preferences, or change them.

    To choose which notifications are sent by email (off, important or all), use --field email=important. To mute
    events, use --field 'mute:=["task.failed"]'. To set the hours in which you receive only critical notifications, use
    --field 'quiet_hours:={"from": "22:00", "to": "07:00", "timezone": "Europe/Berlin"}'.
    """
    body = read_body(None, fields)
    found = client.send("PUT", "/notifications/preferences", body=body) if body else None
    found = found or client.get("/notifications/preferences")
    quiet = json.dumps(found["quiet_hours"]) if found["quiet_hours"] else None
    shown = {"email": found["email"], "muted": " ".join(found["mute"]), "quiet hours": quiet}
    print_fields(found, shown, as_json=as_json)


# -- channels


@notifications_command_group.command("channels")
@client_command
def list_channels(client: ApiClient, *, as_json: bool) -> None:
    """List the channels through which notifications are sent."""
    print_table(
        list(client.pages(CHANNELS)),
        CHANNEL_COLUMNS,
        as_json=as_json,
        empty="There are no channels. Create one: corral notifications create-channel NAME --type TYPE --field …",
        colour_of="status",
        computed={
            "enabled": lambda row: "yes" if row["is_enabled"] else "no",
            "status": lambda row: f"failing ({row['last_error']})" if row["status"] == "failing" else row["status"],
            "used_by": lambda row: ", ".join(rule["name"] for rule in row["used_by"]),
        },
    )


@notifications_command_group.command("channel-types")
@client_command
def list_channel_types(client: ApiClient, *, as_json: bool) -> None:
    """List the channel types and the fields of their configurations."""
    print_table(
        client.get("/notifications/channel-types")["items"],
        ("type", "title", "members"),
        as_json=as_json,
        computed={"members": lambda row: " ".join(row["schema"].get("properties", {}))},
    )


@notifications_command_group.command("create-channel")
@click.argument("name")
@click.option(
    "--type", "kind", required=True, help="type of the channel; `corral notifications channel-types` lists the types"
)
@body_option
@field_option
@click.option(
    "--secret-file",
    "secret_files",
    multiple=True,
    metavar="FIELD=FILE",
    help="secret config field, such as bot_token, and the file that contains its value; repeatable",
)
@client_command
def create_channel(
    client: ApiClient,
    *,
    name: str,
    kind: str,
    input_path: Path | None,
    fields: tuple[str, ...],
    secret_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Create a channel, for example with --type webhook --field url=https://example.org/hook.

    The fields form the channel's configuration. To list the possible fields, use corral notifications channel-types.
    """
    config = {**read_body(input_path, fields), **_secrets(secret_files)}
    made = client.post(CHANNELS, {"name": name, "type": kind, "config": config})
    lines = [f"Created {made['name']} ({made['id']})."]
    lines += warnings_in_words(made["warnings"])
    lines.append(f"Try it: corral notifications test-channel {shlex.quote(made['name'])}")
    print_value(made, as_json=as_json, text="\n".join(lines))


@notifications_command_group.command("edit-channel")
@channel_argument
@body_option
@field_option
@click.option("--name", help="new name of the channel")
@click.option("--enable/--disable", "is_enabled", default=None, help="enable or disable the channel")
@click.option(
    "--secret-file",
    "secret_files",
    multiple=True,
    metavar="FIELD=FILE",
    help="secret config field to replace, and the file that contains its new value; repeatable",
)
@client_command
def edit_channel(
    client: ApiClient,
    *,
    channel: str,
    input_path: Path | None,
    fields: tuple[str, ...],
    name: str | None,
    is_enabled: bool | None,
    secret_files: tuple[str, ...],
    as_json: bool,
) -> None:
    """Change a channel. Configuration fields that are not given keep their values."""
    config = {**read_body(input_path, fields), **_secrets(secret_files)}
    given = {"name": name, "is_enabled": is_enabled, "config": config or None}
    body = {key: value for key, value in given.items() if value is not None}
    if not body:
        raise click.UsageError("nothing to change; give an option such as --name, --disable or --field")
    changed = client.send("PUT", f"{CHANNELS}/{_find_id(client, CHANNELS, channel)}", body=body)
    print_value(changed, as_json=as_json, text=f"Changed {changed['name']}.")


@notifications_command_group.command("delete-channel")
@channel_argument
@client_command
def delete_channel(client: ApiClient, *, channel: str, as_json: bool) -> None:
    """Delete a channel that no rule uses."""
    found = _find_id(client, CHANNELS, channel)
    client.send("DELETE", f"{CHANNELS}/{found}")
    print_value({"id": found}, as_json=as_json, text=f"Deleted {channel}.")


@notifications_command_group.command("test-channel")
@channel_argument
@client_command
def test_channel(client: ApiClient, *, channel: str, as_json: bool) -> None:
    """Send a test notification through a channel, and wait for the result.

    Exits with status 1 if the notification was not delivered.
    """
    found = client.post(f"{CHANNELS}/{_find_id(client, CHANNELS, channel)}/test", {})
    took = format_ms(found["duration_ms"])
    why = FAILURES.get(found["error"], found["error"])
    text = f"Delivered after {took}." if found["delivered"] else f"Not delivered: {why}"
    print_value(found, as_json=as_json, text=text)
    if not found["delivered"]:
        raise SystemExit(1)


# -- rules


@notifications_command_group.command("rules")
@client_command
def list_rules(client: ApiClient, *, as_json: bool) -> None:
    """List the rules. A rule determines which events are sent through which channels."""
    names = {row["id"]: row["name"] for row in client.pages(CHANNELS)}
    print_table(
        list(client.pages(RULES)),
        RULE_COLUMNS,
        as_json=as_json,
        empty="There are no rules. Create one: corral notifications create-rule NAME --event EVENT --channel CHANNEL",
        computed={
            "events": lambda row: " ".join(row["events"]),
            "channels": lambda row: ", ".join(names.get(each, each) for each in row["channel_ids"]),
            "enabled": lambda row: "yes" if row["enabled"] else "no",
        },
    )


@notifications_command_group.command("create-rule")
@click.argument("name")
@click.option(
    "--event",
    "events",
    multiple=True,
    help="event that the rule applies to, such as task.failed, task.* or *; repeatable",
)
@click.option(
    "--channel",
    "channels",
    multiple=True,
    help="name or id of a channel through which the rule sends notifications; repeatable",
)
@body_option
@field_option
@client_command
def create_rule(
    client: ApiClient,
    *,
    name: str,
    events: tuple[str, ...],
    channels: tuple[str, ...],
    input_path: Path | None,
    fields: tuple[str, ...],
    as_json: bool,
) -> None:
    """Create a rule. To set other fields, such as group_by, use --field or a file."""
    body = {**read_body(input_path, fields), "name": name, **_rule_parts(client, events, channels)}
    if "events" not in body:
        raise click.UsageError("use --event to name the events that the rule applies to")
    made = client.post(RULES, body)
    name = shlex.quote(made["name"])
    text = f"Created {made['name']} ({made['id']}).\nWhat it would have sent: corral notifications test-rule {name}"
    print_value(made, as_json=as_json, text=text)


@notifications_command_group.command("edit-rule")
@rule_argument
@click.option(
    "--event",
    "events",
    multiple=True,
    help="event that the rule applies to; repeatable; the given events replace all existing ones",
)
@click.option(
    "--channel",
    "channels",
    multiple=True,
    help="channel through which the rule sends notifications; repeatable; the given channels replace all existing ones",
)
@click.option("--enable/--disable", "enabled", default=None, help="enable or disable the rule")
@body_option
@field_option
@client_command
def edit_rule(
    client: ApiClient,
    *,
    rule: str,
    events: tuple[str, ...],
    channels: tuple[str, ...],
    enabled: bool | None,
    input_path: Path | None,
    fields: tuple[str, ...],
    as_json: bool,
) -> None:
    """Change a rule. Absent fields stay unchanged."""
    body = {**read_body(input_path, fields), **_rule_parts(client, events, channels)}
    if enabled is not None:
        body["enabled"] = enabled
    if not body:
        raise click.UsageError("nothing to change; give an option such as --event, --channel or --disable")
    changed = client.send("PUT", f"{RULES}/{_find_id(client, RULES, rule)}", body=body)
    print_value(changed, as_json=as_json, text=f"Changed {changed['name']}.")


@notifications_command_group.command("delete-rule")
@rule_argument
@client_command
def delete_rule(client: ApiClient, *, rule: str, as_json: bool) -> None:
    """Delete a rule. Messages that the rule has already created are still sent."""
    found = _find_id(client, RULES, rule)
    client.send("DELETE", f"{RULES}/{found}")
    print_value({"id": found}, as_json=as_json, text=f"Deleted {rule}.")


@notifications_command_group.command("test-rule")
@rule_argument
@click.option(
    "--days",
    type=click.IntRange(1, 30),
    default=7,
    show_default=True,
    help="number of past days whose events are tested against the rule",
)
@client_command
def test_rule(client: ApiClient, *, rule: str, days: int, as_json: bool) -> None:
    """Show the messages that a rule would have sent for recent events. Nothing is sent."""
    found = client.post(f"{RULES}/{_find_id(client, RULES, rule)}/test", {"days": days})
    if as_json:
        print_value(found, as_json=True, text="")
        return
    click.echo(f"Of {found['events']} events, {found['matched']} match. Messages: {found['messages']}.")
    if found["items"]:
        names = ObjectNames(client)
        computed: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "titles": lambda row: "; ".join(row["titles"][:3]),
            "channel": lambda row: names.name(CHANNELS, row["channel_id"]),
        }
        print_table(found["items"], PREVIEW_COLUMNS, as_json=False, computed=computed)


# -- deliveries


@notifications_command_group.command("deliveries")
@click.option("--channel", help="list only deliveries of this channel")
@click.option("--rule", help="list only deliveries of this rule")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only deliveries with this status")
@limit_option
@client_command
def list_deliveries(
    client: ApiClient, *, channel: str | None, rule: str | None, status: tuple[str, ...], limit: int, as_json: bool
) -> None:
    """List the messages that were or will be sent through channels, newest first."""
    query: dict[str, Any] = {"status": list(status), "limit": limit}
    names = ObjectNames(client)
    if channel is not None:
        query["channel_id"] = _find_id(client, CHANNELS, channel)
    if rule is not None:
        query["rule_id"] = _find_id(client, RULES, rule)
    items = client.get("/notifications/deliveries", **query)["items"]
    waiting = [] if as_json else [item for item in items if item["finished_at"] is None]
    held = {each: text for each in {item["channel_id"] for item in waiting} if (text := _breaker_text(names, each))}
    print_table(
        items,
        DELIVERY_COLUMNS,
        as_json=as_json,
        empty="There are no such deliveries.",
        colour_of="status",
        computed={
            "title": lambda row: _title_text(row["events"][0]["title"], row["count"]) if row["events"] else "",
            "channel": lambda row: names.name(CHANNELS, row["channel_id"]),
            "rule": lambda row: names.name(RULES, row["rule_id"]),
            "next_attempt_at": lambda row: (
                "waits for the breaker"
                if row["finished_at"] is None and row["channel_id"] in held
                else row["next_attempt_at"]
            ),
        },
    )
    for text in sorted(set(held.values())):
        click.echo(f"Deliveries wait: {text}", err=True)


@notifications_command_group.command("retry")
@click.argument("delivery")
@client_command
def retry_delivery(client: ApiClient, *, delivery: str, as_json: bool) -> None:
    """Retry a delivery that failed, was cancelled or was suppressed."""
    with client.explain_not_found("delivery", delivery, "corral notifications deliveries"):
        row = client.post(f"/notifications/deliveries/{delivery}/retry", {})
    print_value(row, as_json=as_json, text=f"{row['id']} is sent again.")


def _breaker_text(names: ObjectNames, channel_id: str) -> str | None:
    """Describe the circuit breaker of a channel and how to close it, or return None if it is already closed."""
    channel = names.read(f"{CHANNELS}/{channel_id}")
    breaker = "smtp" if channel is not None and channel["type"] == "email" else f"notify:{channel_id}"
    found = names.read(f"/circuit-breakers/{breaker}")
    if found is None or found["state"] == "closed":
        return None
    until = f" until {found['retry_at']}" if found["state"] == "open" and not found["forced"] else ""
    told = f"the circuit breaker {breaker} is {found['state'].replace('_', '-')}{until} ({found['reason'].rstrip('.')})"
    return f"{told}. Close it at once: corral circuit-breakers force-close {breaker}"


def _title_text(title: str, count: int) -> str:
    """Return the title of a notification that combines `count` events, such as `Task failed and 2 more`."""
    return f"{title} and {count - 1} more" if count > 1 else title


def _all_titles(notification: Mapping[str, Any]) -> str | None:
    """Return the distinct titles of a notification's events, one per line, or None if there are fewer than two."""
    titles = notification["titles"]
    if len(titles) < 2:
        return None
    return "\n".join(titles) + ("\n…" if notification["count"] > len(titles) == MAX_TITLES else "")


def _notification_id(client: ApiClient, notification: str) -> str:
    """Return the given id, or the id of the newest notification with the given title.

    The title may be that of any event in the notification.
    """
    return newest_id(
        client,
        "/notifications",
        notification,
        kind="notification",
        titles=lambda row: [row["title"], *row["titles"], _title_text(row["title"], row["count"])],
        listing="corral notifications list",
    )


def _about(client: ApiClient, object: dict[str, str] | None) -> str | None:
    """Return the kind and name of a notification's object, such as `task Sort the mail (…)`.

    Return None if the notification has no object.
    """
    if object is None:
        return None
    kind = object["type"].replace("_", " ")
    path, field = NAMED.get(object["type"], (None, ""))
    name = ObjectNames(client).name(path, object["id"], field) if path is not None else object["id"]
    return f"{kind} {name}" + (f" ({object['id']})" if name != object["id"] else "")


def _explain_not_found(client: ApiClient, notification: str) -> AbstractContextManager[None]:
    return client.explain_not_found("notification", notification, "corral notifications list")


def _rule_parts(client: ApiClient, events: tuple[str, ...], channels: tuple[str, ...]) -> dict[str, Any]:
    parts: dict[str, Any] = {"events": list(events)} if events else {}
    if channels:
        parts["channel_ids"] = [_find_id(client, CHANNELS, each) for each in channels]
    return parts


def _find_id(client: ApiClient, path: str, name: str) -> str:
    """Return the id of the channel or rule with this id or name."""
    if (found := parse_id(name)) is not None:
        return found
    rows: list[Mapping[str, Any]] = list(client.pages(path))
    alike = [row for row in rows if row["name"].casefold() == name.strip().casefold()]
    same = [row for row in alike if row["name"] == name] or alike
    kind = path.rpartition("/")[2]
    if not same:
        problem = f"there is no {kind.removesuffix('s')} named {name} at {client.url}"
        raise ApiClientError(f"{problem}; `corral notifications {kind}` lists all {kind}", 404)
    if len(same) > 1:
        ids = ", ".join(row["id"] for row in same)
        raise ApiClientError(f"{len(same)} {kind} are named {name}; give one of these ids instead: {ids}")
    return str(same[0]["id"])


def _secrets(given: tuple[str, ...]) -> dict[str, str]:
    """Read the secret fields of a channel's config from files."""
    found = {}
    for each in given:
        member, separator, path = each.partition("=")
        if not separator:
            raise click.UsageError("--secret-file must have the form FIELD=FILE")
        found[member] = Path(path).read_text("utf-8").strip()
    return found
