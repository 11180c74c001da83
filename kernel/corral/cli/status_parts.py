"""The sections that plugins add to `corral status` through entry points in the group `corral.status`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

from corral.cli.api_client import ApiClient, ApiClientError

MAX_NAMES = 5  # objects that a line of `corral status` names


class StatusPart(NamedTuple):
    """A section that a plugin adds to `corral status`.

    `found` is the value of the section in the JSON output, or None if the value is unknown. `text` describes what needs
    attention, and names the command that shows it. If nothing needs attention, `text` is None.
    """

    found: Any
    text: str | None = None


def read_if_allowed(client: ApiClient, path: str, *, needs: str | None = None, **query: Any) -> Any:
    """Return the API's response for a path, or None if the user may not read it or its plugin is not active.

    `needs` is the permission that the path requires. Without this permission, no request is sent, because the audit log
    records refused requests for privileged paths.
    """
    if needs is not None and needs not in client.me()["permissions"]:
        return None
    try:
        return client.get(path, **query)
    except ApiClientError as error:
        if error.status not in (403, 404):
            raise
        return None


def some_names(names: Iterable[str]) -> str:
    """Join the names with commas. If there are many names, list only the first few."""
    named = list(names)
    rest = len(named) - MAX_NAMES
    return ", ".join(named[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def name_for_command(names: Iterable[str]) -> str:
    """Return the name to show in a suggested command: the only name, or the placeholder `NAME` if there are several."""
    named = list(names)
    return shlex.quote(named[0]) if len(named) == 1 else "NAME"
