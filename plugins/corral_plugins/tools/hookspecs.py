"""The hook specifications of the `tools` plugin."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from corral_plugins.tools.api import McpClient, Tool

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_tools() -> Iterable[Tool]:  # type: ignore[empty-body]
    """Contribute tools for agents.

    The name of a tool must contain a dot and begin with a small letter; a plugin that contributes another name is
    `failed`. If another tool already has the same name, the tool is ignored.
    """


@hookspec
def corral_mcp_clients() -> Iterable[McpClient]:  # type: ignore[empty-body]
    """Contribute the client with which the `tools` plugin reaches MCP servers.

    If several plugins contribute a client, the plugin whose name comes first in alphabetical order wins. Without a
    client, no MCP server can be added.
    """
