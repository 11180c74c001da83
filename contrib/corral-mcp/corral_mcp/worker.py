"""The worker part of this plugin: starts MCP servers by running commands, for `corral worker --mcp`.

Only worker processes and the processes of their tasks load this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from mcp import Client, StdioServerParameters

from corral_mcp.client import list_tools, result_of
from corral_mcp.client_sdk import CORRAL
from corral_plugins.tools.api import McpResult, McpTool


class CommandSession:
    """A session with an MCP server that runs as a child process."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def list_tools(self) -> Sequence[McpTool]:
        """Return all tools of the server."""
        return await list_tools(self._client)

    async def call_tool(self, tool: str, arguments: Mapping[str, Any]) -> McpResult:
        """Call one of the server's tools."""
        return result_of(await self._client.call_tool(tool, dict(arguments)))


@contextlib.asynccontextmanager
async def start_command(
    command: str, arguments: Sequence[str], variables: Mapping[str, str]
) -> AsyncIterator[CommandSession]:
    """Run a command that starts an MCP server, open a session with it, and stop the server when the context ends.

    The server gets the given environment variables, and a few from this process, such as PATH and HOME.
    """
    parameters = StdioServerParameters(command=command, args=list(arguments), env=dict(variables))
    async with Client(parameters, client_info=CORRAL, cache=None) as client:
        yield CommandSession(client)
