"""The `corral messages` commands, which list, send, read and acknowledge messages from a terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

from corral.cli.api_client import ApiClient
from corral.cli.object_lookup import ObjectNames, find_user_id, newest_id
from corral.cli.output import print_fields, print_table, print_value
from corral.cli.server_connection import client_command, complete_names
from corral.cli.status_parts import read_if_allowed
from corral_core.accounts.api import USERS_PATH

STATUSES = ("sent", "delivered", "read", "acked", "expired")
TYPES = ("info", "request", "reply", "handoff", "alert")
HEAD_LENGTH = 40  # characters of a message without a subject that lists show
COLUMNS = ("created_at", "sender", "recipient", "type", "status", "subject", "id")
WARNINGS = {
    "recipient_offline": "the agent is not started; it receives the message when it takes its next task",
    "no_subscribers": "no other agent subscribes to the channel; people can read the message",
}

for_agent = click.option(
    "--agent",
    help="agent for which the command acts; needed if you can act for several recipients of the message",
    shell_complete=complete_names("/agents"),
)


@click.group("messages")
def messages_command_group() -> None:
    """Send messages to agents, people and channels, and read and acknowledge messages."""


@messages_command_group.command("list")
@click.option("--agent", help="list only messages that this agent sent or received")
@click.option("--channel", help="list only messages in this channel")
@click.option("--status", type=click.Choice(STATUSES), multiple=True, help="list only messages in this state")
@click.option(
    "--unread", is_flag=True, help="list only messages that you (or the agent given with --agent) have not read"
)
@click.option(
    "--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="maximum number of messages to list"
)
@client_command
def list_messages(
    client: ApiClient,
    *,
    agent: str | None,
    channel: str | None,
    status: tuple[str, ...],
    unread: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List the newest messages."""
    query: dict[str, Any] = {"status": list(status), "limit": limit}
    if agent is not None:
        query["agent_id"] = _find_agent(client, agent)
    if channel is not None:
        query["channel"] = channel
    if unread:
        query["unread"] = "true"
    names = ObjectNames(client)
    print_table(
        client.get("/messages", **query)["items"],
        COLUMNS,
        as_json=as_json,
        empty="There are no such messages. Send one: corral messages send --to-agent AGENT TEXT",
        colour_of="status",
        computed={
            "sender": lambda message: message["sender_name"],
            "recipient": lambda message: _recipient(names, message),
            "subject": _title,
        },
    )


@messages_command_group.command("send")
@click.argument("text")
@click.option("--to-agent", help="agent that receives the message", shell_complete=complete_names("/agents"))
@click.option("--to-user", metavar="EMAIL|ID", help="user who receives the message")
@click.option("--channel", help="channel whose subscribers receive the message")
@click.option("--as-agent", help="agent on whose behalf the message is sent", shell_complete=complete_names("/agents"))
@click.option("--subject", default="", help="subject of the message")
@click.option("--type", "kind", type=click.Choice(TYPES), help="type of the message; a 'request' expects an answer")
@click.option("--reply-to", help="id or subject of the message to reply to")
@client_command
def send_message(
    client: ApiClient,
    *,
    text: str,
    to_agent: str | None,
    to_user: str | None,
    channel: str | None,
    as_agent: str | None,
    subject: str,
    kind: str | None,
    reply_to: str | None,
    as_json: bool,
) -> None:
    """Send a message. TEXT is the body of the message. If TEXT is -, the body is read from standard input."""
    if sum(each is not None for each in (to_agent, to_user, channel)) != 1:
        raise click.UsageError("give exactly one of --to-agent, --to-user and --channel")
    body = {
        "body": sys.stdin.read() if text == "-" else text,
        "subject": subject,
        "type": kind,
        "in_reply_to": None if reply_to is None else _message_id(client, reply_to),
        "recipient_agent_id": None if to_agent is None else _find_agent(client, to_agent),
        "recipient_user_id": None if to_user is None else find_user_id(client, USERS_PATH, to_user),
        "channel": channel,
        "sender_agent_id": None if as_agent is None else _find_agent(client, as_agent),
    }
    sent = client.post("/messages/send", {name: value for name, value in body.items() if value is not None})
    print_value(sent, as_json=as_json, text=f"Sent {sent['id']}.")
    for warning in () if as_json else sent["warnings"]:
        click.echo(click.style("warning", fg="yellow") + f": {WARNINGS.get(warning, warning)}", err=True)


@messages_command_group.command("read")
@click.argument("message")
@for_agent
@client_command
def read_message(client: ApiClient, *, message: str, agent: str | None, as_json: bool) -> None:
    """Mark a message as read, and show it.

    MESSAGE is an id or a subject. If several messages have the same subject, the newest is used.
    """
    body = {} if agent is None else {"agent_id": _find_agent(client, agent)}
    message = _message_id(client, message)
    with client.explain_not_found("message", message, "corral messages list"):
        found = client.send("PATCH", f"/messages/{message}/read", body=body)
    shown = {
        "from": found["sender_name"],
        "to": _recipient(ObjectNames(client), found),
        "sent": found["created_at"],
        "type": found["type"],
        "status": found["status"],
        "trust": found["trust"],
        "subject": found["subject"],
        "in reply to": None if as_json else _title_of(client, found["in_reply_to"]),
        "text": found["body"],
    }
    print_fields(found, shown, as_json=as_json)


@messages_command_group.command("ack")
@click.argument("message")
@click.option("--rejected", is_flag=True, help="reject the request in the message instead of reporting it as done")
@click.option("--note", help="note to store with the acknowledgement")
@for_agent
@client_command
def acknowledge_message(
    client: ApiClient, *, message: str, rejected: bool, note: str | None, agent: str | None, as_json: bool
) -> None:
    """Acknowledge that the request in a message is done, or that it is rejected."""
    body: dict[str, Any] = {"result": "rejected" if rejected else "done", "note": note}
    if agent is not None:
        body["agent_id"] = _find_agent(client, agent)
    message = _message_id(client, message)
    with client.explain_not_found("message", message, "corral messages list"):
        found = client.post(f"/messages/{message}/ack", body)
    print_value(found, as_json=as_json, text=f"Acknowledged {found['id']} as {body['result']}.")


def _find_agent(client: ApiClient, name: str) -> str:
    return str(client.find("/agents", name, kind="agent")["id"])


def _title(message: Any) -> str:
    return str(message["subject"] or _head(message["body"]))


def _title_of(client: ApiClient, message_id: str | None) -> str | None:
    """Return the title of a message: its subject or, if it has none, the beginning of its body.

    If the user is not allowed to read the message, return the id instead.
    """
    found = read_if_allowed(client, f"/messages/{message_id}") if message_id is not None else None
    return message_id if found is None else _title(found)


def _message_id(client: ApiClient, message: str) -> str:
    """Return the given id, or the id of the newest message with this title.

    The title is the subject or, if there is none, the beginning of the body.
    """
    return newest_id(
        client, "/messages", message, kind="message", titles=lambda row: [_title(row)], listing="corral messages list"
    )


def _head(body: str) -> str:
    """Return the beginning of a message body as one line."""
    line = " ".join(body.split())
    return line if len(line) <= HEAD_LENGTH else f"{line[: HEAD_LENGTH - 1]}…"


def _recipient(names: ObjectNames, message: Any) -> str:
    """Describe the recipient of a message."""
    if message["recipient_agent_id"] is not None:
        return names.name("/agents", message["recipient_agent_id"])
    if message["channel"] is not None:
        return f"#{message['channel']}"
    return f"user {names.user(USERS_PATH, message['recipient_user_id'])}"
