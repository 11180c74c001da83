"""The line about unread messages in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed, some_names


def message_status(client: ApiClient) -> StatusPart:
    """Describe the user's unread messages, and name their senders."""
    found = read_if_allowed(client, "/messages", needs="messages.read", unread="true")
    if found is None or not found["total"]:
        return StatusPart(found)
    senders = some_names(dict.fromkeys(each["sender_name"] for each in found["items"]))
    return StatusPart(found, f"{found['total']} unread, from {senders}. Read them: corral messages list --unread")
