"""The lines of `corral status` about plugins that are not running, and about a failed reload."""

from __future__ import annotations

from corral.cli.api_client import ApiClient
from corral.cli.status_parts import MAX_NAMES, StatusPart, read_if_allowed

STATES = ("failed", "blocked", "quarantined")


def plugin_status(client: ApiClient) -> StatusPart:
    """Tell admins which enabled plugins are not running, and why."""
    found = read_if_allowed(client, "/plugins", needs="plugins.read", state=list(STATES))
    if found is None or not found["items"]:
        return StatusPart(found)
    lines = [f"{each['name']} is {each['state']}: {each['reason']}" for each in found["items"][:MAX_NAMES]]
    if len(found["items"]) > MAX_NAMES:
        lines.append(f"{len(found['items']) - MAX_NAMES} more")
    lines.append("See all: corral plugins list")
    return StatusPart(found, "\n".join(lines))


def reload_status(client: ApiClient) -> StatusPart:
    """Explain why the last reload failed, if the server runs on this machine and uses this data folder."""
    from corral.cli.server_connection import failed_reloads_of

    found = failed_reloads_of(client.url)
    told = [
        f"failed, so the server runs as before: {error}\nFix the cause, and reload again: kill -HUP {process}"
        for process, error in found.items()
    ]
    return StatusPart(found, "\n".join(told) or None)
