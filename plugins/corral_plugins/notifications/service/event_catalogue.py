"""The events that cause notifications: their default recipients, their severity, and the text of notifications."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast
from urllib.parse import quote

import msgspec

from corral.events.log import LoggedEvent
from corral.http.routes import API_PREFIX
from corral_plugins.notifications.api import SEVERITIES, Severity
from corral_plugins.notifications.service.plain_text import one_line, without_control_characters

Audience = Literal["owner", "admins", "approvers", "requester", "recipient", "reviewers", "author"]
Payload = Mapping[str, Any]
OWN_EVENT = "notification"
CHANNEL_FAILING = "channel_failing"

DEFAULTS: Mapping[str, Audience] = {
    "api_key.expiring": "owner",
    "approval.created": "approvers",
    "approval.updated": "approvers",
    "approval.resolved": "requester",
    "budget.exceeded": "admins",
    "budget.threshold": "admins",
    "circuit.opened": "admins",
    "code_review.changes_requested": "author",
    "code_review.created": "reviewers",
    "code_review.updated": "reviewers",
    "message.new": "recipient",
    "secret.expiring": "admins",
    "session.ended": "owner",
    "ssh.host_key_mismatch": "admins",
    "system.alert": "admins",
    "task.dead_lettered": "owner",
    "task.failed": "owner",
    "task.stalled": "owner",
    "trigger.disabled": "owner",
    "trigger.failed": "owner",
    "webhook.disabled": "owner",
    "worker.offline": "admins",
    "worker.registered": "admins",
    "workflow.run.failed": "owner",
}
"""The events about which people are notified without a rule, and the audience of each event."""

SEVERITY_OF: Mapping[str, Severity] = {
    "budget.exceeded": "critical",
    "budget.threshold": "warning",
    "ssh.host_key_mismatch": "critical",
    "task.dead_lettered": "error",
    "task.failed": "error",
    "task.stalled": "error",
    "trigger.failed": "error",
    "workflow.run.failed": "error",
}
EMBEDDED_WORKER = "embedded"  # the name is reserved; the server starts and stops this worker itself
_ONLY_IF: Mapping[str, Callable[[Payload], bool]] = {
    "approval.updated": lambda data: data.get("change") == "reminder",
    "code_review.updated": lambda data: data.get("change") == "reminder",
    "message.new": lambda data: data.get("recipient_user_id") is not None,
    "session.ended": lambda data: data.get("reason") in ("reuse", "revoked"),
    "system.alert": lambda data: data.get("kind") != "ssh_host_key_mismatch",  # ssh.host_key_mismatch tells it
    "task.dead_lettered": lambda data: data.get("previous") == "failed",  # otherwise task.failed tells it
    "worker.offline": lambda data: data.get("name") != EMBEDDED_WORKER,
    "worker.registered": lambda data: data.get("name") != EMBEDDED_WORKER,
}
"""The conditions under which some events cause a notification.

Some conditions exclude events that merely repeat another event.
"""
_TITLES: Mapping[str, str] = {
    "api_key.expiring": "The API key {name} expires soon",
    "approval.created": "Approval needed: {title}",
    "approval.updated": "Approval still needed: {title}",
    "approval.resolved": "Approval {outcome}: {title}",
    "budget.exceeded": "The budget is used up ({scope})",
    "budget.threshold": "{percent} % of the budget is used ({scope})",
    "circuit.opened": "The circuit breaker {name} opened",
    "code_review.changes_requested": "A diff was sent back to its agent (revision {revision})",
    "code_review.created": "A diff waits for a review",
    "code_review.updated": "A diff still waits for a review (revision {revision})",
    "message.new": "New message: {subject}",
    "notification_channel.changed": "Notification channel {change}: {name}",
    "secret.expiring": "The secret {name} expires soon",
    "session.ended": "A session was ended ({reason})",
    "ssh.host_key_mismatch": "The host key of {name} has changed",
    "system.alert": "{title}",
    "task.completed": "Task completed: {title}",
    "task.dead_lettered": "Task given up: {title}",
    "task.failed": "Task failed: {title}",
    "task.stalled": "Task stalled: {title}",
    "trigger.disabled": "The trigger {name} was disabled",
    "trigger.failed": "The trigger {name} failed",
    "webhook.disabled": "A webhook was disabled ({reason})",
    "worker.offline": "The worker {name} is offline",
    "worker.registered": "The worker {name} registered",
    "workflow.run.failed": "The workflow {name} failed",
}
_MENTION_TITLES: Mapping[str, str] = {
    "code_review.commented": "You were mentioned in a comment on a code review",
    "message.new": "You were mentioned in a message: {subject}",
}
_PATHS: Mapping[str, str] = {
    "agent": "agents",
    "approval": "approvals",
    "circuit_breaker": "circuit-breakers",
    "code_review": "code-reviews",
    "file": "files",
    "message": "messages",
    "secret": "secrets",
    "ssh_connection": "ssh-connections",
    "task": "tasks",
    "trigger": "triggers",
    "webhook": "webhooks",
    "worker": "workers",
    "workflow": "workflows",
    "workflow_run": "workflow-runs",
}
"""The API path of each type of object, to which the object's id is appended."""
_COMMANDS: Mapping[str, str] = {
    "agent": "agents show",
    "approval": "approvals show",
    "circuit_breaker": "circuit-breakers show",
    "code_review": "reviews show",
    "file": "files show",
    "message": "messages read",
    "plugin": "plugins show",
    "ssh_connection": "ssh show",
    "task": "tasks show",
    "trigger": "triggers history",
    "webhook": "webhooks show",
    "worker": "workers show",
    "workflow": "workflows show",
    "workflow_run": "workflows show-run",
}
"""The command that shows each type of object. The object's id follows the command."""
MAX_TITLE, MAX_BODY = 200, 2000


class NotificationContent(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a notification about an event."""

    title: str
    body: str
    severity: Severity
    href: str | None


def notifies_by_default(event: LoggedEvent, data: Payload) -> bool:
    """Return whether people are notified of this event without a rule."""
    only_if = _ONLY_IF.get(event.type)
    return event.type in DEFAULTS and (only_if is None or only_if(data))


def severity_of(event: LoggedEvent, data: Payload) -> Severity:
    """Return the severity of an event. An alert carries its own severity."""
    if event.type == "system.alert":
        told = data.get("severity")
        return cast(Severity, told) if told in SEVERITIES else "warning"
    return SEVERITY_OF.get(event.type, "info")


def is_at_least(severity: str, least: str) -> bool:
    """Return whether a severity is at least as high as `least`."""
    return SEVERITIES.index(cast(Severity, severity)) >= SEVERITIES.index(cast(Severity, least))


def describe(event: LoggedEvent, data: Payload, title: str) -> NotificationContent:
    """Return the content of a notification about an event. `title` is the title of the event type."""
    template = _TITLES.get(event.type)
    text = title.rstrip(".") if template is None else template.format_map(_Values(data)).removesuffix(": ")
    if template is None and (named := data.get("title") or data.get("name")):
        text = f"{text}: {named}"
    return NotificationContent(
        title=one_line(text, MAX_TITLE),
        body=_body_of(event, data),
        severity=severity_of(event, data),
        href=href_of(event.object_type, event.object_id),
    )


def title_of_mention(event: LoggedEvent, data: Payload) -> str:
    """Return the title of a notification to a person who is mentioned in the text of an event."""
    return one_line(_MENTION_TITLES[event.type].format_map(_Values(data)).removesuffix(": "), MAX_TITLE)


def href_of(object_type: str, object_id: str) -> str | None:
    """Return the API path of an object, or None if the API has no path for this type of object."""
    path = _PATHS.get(object_type)
    return None if path is None else f"{API_PREFIX}/{path}/{quote(object_id, safe=':')}"


def _body_of(event: LoggedEvent, data: Payload) -> str:
    """Return the most informative text of an event, followed by the command that shows the event's object."""
    command = _COMMANDS.get(event.object_type)
    tail = "" if command is None else f"See it: corral {command} {event.object_id}"
    if event.object_type == "budget":  # of all budgets, because one alone has no command
        tail = "See it: corral cost budget show"
    text = without_control_characters(_text_of(data), MAX_BODY - len(tail) - 1)
    return "\n".join(part for part in (text, tail) if part)


def _text_of(data: Payload) -> str:
    error = data.get("error")
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("type")
    found = (error, data.get("detail"), data.get("reason"), data.get("note"), data.get("result_summary"))
    return next((str(text) for text in found if text), "")


class _Values(dict[str, Any]):
    """The values that are inserted into a title. A dash stands for an absent value."""

    def __missing__(self, name: str) -> str:
        return "-"
