"""The line of `corral status` about agents that stopped because their tasks failed."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, name_for_command, read_if_allowed, some_names


def agent_status(client: ApiClient) -> StatusPart:
    """Describe the agents in the state `error`, which take no tasks until somebody starts them."""
    found = read_if_allowed(client, "/agents", status="error")
    if found is None or not found["items"]:
        return StatusPart(found)
    names = [each["name"] for each in found["items"]]
    command = f"corral agents start {name_for_command(names)}"
    told = f"{some_names(names)}: tasks failed in a row. Correct the configuration, then: {command}"
    return StatusPart(found, told)
