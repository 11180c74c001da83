"""The line about dead letters in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed


def letter_status(client: ApiClient) -> StatusPart:
    """Report the number of open dead letters to admins."""
    found = read_if_allowed(client, "/dead-letter", needs="dead_letter.read", limit=1)
    if found is None or not found["total"]:
        return StatusPart(found)
    tasks = "1 task has" if found["total"] == 1 else f"{found['total']} tasks have"
    return StatusPart(found, f"{tasks} failed for good. Look at them: corral dead-letter list")
