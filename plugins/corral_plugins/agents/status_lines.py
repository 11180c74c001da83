"""The lines in the output of `corral status` about agents that stopped because their attempts failed or stalled."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, name_for_command, read_if_allowed, some_names


def agent_status(client: ApiClient) -> StatusPart:
    """Describe the agents that failed or stalled and therefore take no tasks until somebody starts them."""
    found = read_if_allowed(client, "/agents", needs="agents.read", status=["error", "paused"], limit=200)
    if found is None:
        return StatusPart(None)
    failed = [each["name"] for each in found["items"] if each["status"] == "error"]
    stalled = [each["name"] for each in found["items"] if each["status_reason"] == "stalled"]
    lines = []
    if failed:
        command = f"corral agents start {name_for_command(failed)}"
        lines.append(f"{some_names(failed)}: tasks failed in a row. Correct the configuration, then: {command}")
    if stalled:
        command = f"corral agents resume {name_for_command(stalled)}"
        lines.append(f"{some_names(stalled)}: paused, because tasks stalled in a row. Find out why, then: {command}")
    return StatusPart(found, "\n".join(lines) or None)
