"""The `mcp` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral_mcp import routes
from corral_mcp.server import CorralServer

if TYPE_CHECKING:
    from corral.plugin import Provide
    from corral_plugins.tools.api import McpClient


class McpPlugin(Plugin):
    """Support for the Model Context Protocol.

    Agents can use the tools of MCP servers, and MCP clients can use agents, tasks and approvals at `/mcp`.
    """

    name = "mcp"
    requires = ("plugin_admin",)
    wants = ("tools",)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        from corral.plugin import Provide

        return [Provide(CorralServer, CorralServer)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes.routes]

    @hookimpl(optionalhook=True)
    def corral_mcp_clients(self) -> Iterable[McpClient]:
        from corral_mcp.client import SdkClient

        return [SdkClient()]
