"""The parts that plugins add to `corral status`, with entry points of the group `corral.status`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

from corral.cli.api_client import ApiClient, ApiClientError

MAX_NAMES = 5  # objects that a line of `corral status` names


class StatusPart(NamedTuple):
    """What a plugin adds to `corral status`.

    `found` is its value in the JSON output, or None if the value is unknown. `text` says what needs attention, and
    names the command that shows it. If `text` is missing, nothing needs attention.
    """

    found: Any
    text: str | None = None


def read_if_allowed(client: ApiClient, path: str, **query: Any) -> Any:
    """Return what the API returns for a path, or None if the user may not read it or its plugin is not active."""
    try:
        return client.get(path, **query)
    except ApiClientError as error:
        if error.status not in (403, 404):
            raise
        return None


def some_names(names: Iterable[str]) -> str:
    """Return the names as text, separated by commas. If there are many names, only the first few are listed."""
    named = list(names)
    rest = len(named) - MAX_NAMES
    return ", ".join(named[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def name_for_command(names: Iterable[str]) -> str:
    """Return the argument of a command about one of these objects: its name if it is the only one, else `NAME`."""
    named = list(names)
    return shlex.quote(named[0]) if len(named) == 1 else "NAME"
