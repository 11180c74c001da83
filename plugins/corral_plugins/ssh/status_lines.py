"""The line about SSH connections in the output of `corral status`."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, name_for_command, read_if_allowed, some_names


def connection_status(client: ApiClient) -> StatusPart:
    """Describe the connections that are blocked because their machine presented an unexpected host key."""
    found = read_if_allowed(client, "/ssh-connections", needs="ssh.read", status="blocked")
    if found is None or not found["items"]:
        return StatusPart(found)
    names = [each["name"] for each in found["items"]]
    command = f"corral ssh show {name_for_command(names)}"
    return StatusPart(found, f"{some_names(names)}: the host key has changed. Compare the keys: {command}")
