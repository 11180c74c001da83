"""The lines of `corral status` about triggers that failed or that Corral disabled."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import StatusPart, name_for_command, read_if_allowed, some_names


def trigger_status(client: ApiClient) -> StatusPart:
    """Describe the triggers that Corral disabled. Triggers that were disabled by a person are omitted."""
    found = read_if_allowed(client, "/triggers", needs="triggers.read", enabled="false", limit=200)
    off = [each for each in found["items"] if each["disabled_reason"]] if found is not None else []
    if not off:
        return StatusPart(off if found is not None else None)
    names = some_names(f"{each['name']} ({each['disabled_reason']})" for each in off)
    command = f"corral triggers show {name_for_command(each['name'] for each in off)}"
    return StatusPart(off, f"{names}. See why, and what to do: {command}")


def failure_status(client: ApiClient) -> StatusPart:
    """Describe the enabled triggers whose most recent action failed."""
    found = read_if_allowed(client, "/triggers", needs="triggers.read", enabled="true", limit=200)
    failed = [each for each in found["items"] if each["consecutive_failures"]] if found is not None else []
    if not failed:
        return StatusPart(failed if found is not None else None)
    names = [each["name"] for each in failed]
    command = f"corral triggers history {name_for_command(names)} --status failed"
    return StatusPart(failed, f"{some_names(names)}. See why: {command}")
