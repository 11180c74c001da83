"""The lines about unread notifications and about channels in the output of `corral status`."""

from __future__ import annotations

import shlex

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import MAX_NAMES, StatusPart, read_if_allowed

SEVERITIES = ("critical", "error", "warning", "info")


def unread_status(client: ApiClient) -> StatusPart:
    """Describe the user's unread notifications by severity, the most severe first."""
    found = read_if_allowed(client, "/notifications/unread-count", needs="notifications.read")
    if found is None or not found["unread"]:
        return StatusPart(found)
    worst = ", ".join(f"{found['by_severity'][each]} {each}" for each in SEVERITIES if found["by_severity"].get(each))
    return StatusPart(found, f"{found['unread']} unread ({worst}). Read them: corral notifications list --unread")


def channel_status(client: ApiClient) -> StatusPart:
    """Describe the channels that currently cannot send notifications."""
    found = read_if_allowed(client, "/notifications/channels", needs="notifications.manage", limit=200)
    if found is None:
        return StatusPart(None)
    bad = [each for each in found["items"] if each["is_enabled"] and each["status"] == "failing"]
    lines = [
        f"{each['name']} fails: {each['last_error']}. "
        f"See what waits: corral notifications deliveries --channel {shlex.quote(each['name'])}"
        for each in bad[:MAX_NAMES]
    ]
    if len(bad) > MAX_NAMES:
        lines.append(f"{len(bad) - MAX_NAMES} more: corral notifications channels")
    return StatusPart(bad, "\n".join(lines) or None)
