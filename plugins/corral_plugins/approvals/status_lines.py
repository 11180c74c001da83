"""The lines about approvals in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed, some_names


def approval_status(client: ApiClient) -> StatusPart:
    """Describe the pending approval requests that the user may decide."""
    found = read_if_allowed(client, "/approvals", needs="approvals.read", assigned_to="me")
    if found is None or not found["items"]:
        return StatusPart(found)
    titles = some_names(f"{each['title']} ({each['risk']})" for each in found["items"])
    verb = "waits" if found["total"] == 1 else "wait"
    told = f"{found['total']} {verb} for your decision: {titles}"
    return StatusPart(found, f"{told}\nRead one: corral approvals show TITLE, then approve or reject")
