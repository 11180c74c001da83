"""The line of `corral status` about SSH connections."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, read_if_allowed, some_names


def connection_status(client: ApiClient) -> StatusPart:
    """Describe the connections that are blocked because their machine showed another host key."""
    found = read_if_allowed(client, "/ssh-connections", status="blocked")
    if found is None or not found["items"]:
        return StatusPart(found)
    names = some_names(each["name"] for each in found["items"])
    return StatusPart(found, f"{names}: the host key has changed. Compare the keys: corral ssh show NAME")
