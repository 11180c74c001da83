"""The hook specification of the `tools` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.tools.api import Tool

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_tools() -> Iterable[Tool]:  # type: ignore[empty-body]
    """Contribute tools for agents.

    The name of a tool must contain a dot. If another tool already has the same name, the tool is ignored.
    """
