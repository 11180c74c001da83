"""The hook that tools offers: tools of other plugins."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.tools.api import Tool

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_tools() -> Iterable[Tool]:  # type: ignore[empty-body]
    """Tools that agents may be given. Names have a dot; a tool whose name another one has is left out."""
