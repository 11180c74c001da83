"""The line about the kill switch in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed


def kill_switch_status(client: ApiClient) -> StatusPart:
    """Report whether the kill switch, which stops all tasks, is engaged."""
    state = read_if_allowed(client, "/admin/kill-switch", needs="admin.read")
    if state is None or not state["engaged"]:
        return StatusPart(state)
    reason = state["reason"] or "no reason given"
    return StatusPart(state, f"engaged: {reason}; no task runs. Release it: corral kill-switch off")
