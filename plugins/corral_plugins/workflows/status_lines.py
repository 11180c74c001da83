"""The line about failed workflow runs in the output of `corral status`."""

from __future__ import annotations

from corral import clock
from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed

PERIOD_SECONDS = 86_400.0


def run_status(client: ApiClient) -> StatusPart:
    """Describe how many runs failed within the last day."""
    wanted = {"status": "failed", "since": clock.now(-PERIOD_SECONDS), "limit": 1}
    found = read_if_allowed(client, "/workflow-runs", needs="workflows.read", **wanted)
    if found is None or not found["total"]:
        return StatusPart(found)
    told = f"{found['total']} within the last 24 hours. Look at them: corral workflows runs --status failed"
    return StatusPart(found, told)
