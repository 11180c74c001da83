"""The hook specifications of the `tools` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.tools.api import McpClient, Tool

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_tools() -> Iterable[Tool]:  # type: ignore[empty-body]
    """Contribute tools for agents.

    The name of a tool must contain a dot and begin with a lower-case letter. A plugin that contributes a tool with any
    other name gets the state `failed`. If several plugins contribute tools with the same name, only one of these tools
    is used: that of the `tools` plugin, or else that of the plugin whose name comes first in alphabetical order.
    """


@hookspec
def corral_mcp_clients() -> Iterable[McpClient]:  # type: ignore[empty-body]
    """Contribute the client that the `tools` plugin uses to reach MCP servers.

    If several plugins contribute a client, the client of the plugin whose name comes first in alphabetical order is
    used. Without a client, no MCP server can be added.
    """
