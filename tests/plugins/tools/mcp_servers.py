"""A client for MCP servers that exist in the test only, for what does not depend on the protocol.

The tests of `corral-mcp` run real servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from corral.plugin import Plugin, hookimpl
from corral_plugins.tools.api import Json, McpClient, McpEndpoint, McpFailure, McpResult, McpTool

TEXT: Json = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def described(name: str, description: str = "A tool.", **more: Any) -> McpTool:
    """A tool as a server describes it."""
    return McpTool(name=name, description=description, schema=more.pop("schema", TEXT), **more)


class InMemoryMcp:
    """Servers by name, and what every other server lists. `failing` is raised instead; `seen` are the calls."""

    def __init__(self, default: Sequence[McpTool] = (), **servers: list[McpTool]) -> None:
        self.default, self.servers = default, servers
        self.seen: list[tuple[str, str, Json]] = []
        self.headers: list[Json] = []
        self.failing: McpFailure | None = None

    async def list_tools(self, endpoint: McpEndpoint) -> Sequence[McpTool]:
        self.headers.append(dict(endpoint.headers))
        if self.failing is not None:
            raise self.failing
        return self.servers.get(endpoint.name, self.default)

    async def call_tool(self, endpoint: McpEndpoint, tool: str, arguments: Json) -> McpResult:
        if self.failing is not None:
            raise self.failing
        self.seen.append((endpoint.name, tool, arguments))
        blocks = [{"type": "text", "text": f"{tool} says {arguments.get('text')}"}, {"type": "image", "data": "AA=="}]
        return McpResult(content=blocks, is_error=arguments.get("text") == "bad")


def mcp_plugin(client: McpClient) -> type[Plugin]:
    """A plugin that contributes this client."""

    class McpPlugin(Plugin):
        """Reaches MCP servers that exist in the test only."""

        name = "mcp"
        wants = ("tools",)

        @hookimpl(optionalhook=True)
        def corral_mcp_clients(self) -> Iterable[McpClient]:
            return [client]

    return McpPlugin
