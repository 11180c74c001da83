"""The lines about circuit breakers in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed


def breaker_status(client: ApiClient) -> StatusPart:
    """List the circuit breakers that are not closed."""
    found = read_if_allowed(client, "/circuit-breakers", needs="circuit_breakers.read", state=["open", "half_open"])
    lines = []
    for each in found["items"] if found is not None else ():
        if each["forced"]:
            close = f"corral circuit-breakers force-close {each['name']}"
            lines.append(f"{each['name']} is forced open: {each['reason'].rstrip('.')}. Close it: {close}")
        else:
            state = each["state"].replace("_", "-")
            lines.append(f"{each['name']} is {state}: {each['reason'].rstrip('.')}. It tries again automatically.")
    return StatusPart(found, "\n".join(lines) or None)
