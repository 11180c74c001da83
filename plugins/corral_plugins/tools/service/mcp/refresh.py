"""Fetches the tool lists of MCP servers, and compares the tools with the definitions that an admin accepted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Problem
from corral.events.event import emit
from corral.redact.redactor import Redactor
from corral_plugins.tools.api import McpChanged, McpFailure, McpTool
from corral_plugins.tools.models import McpServerRow, McpToolRow
from corral_plugins.tools.service.mcp.connections import McpConnections
from corral_plugins.tools.service.mcp.definitions import ListedTools, McpDefinition, listed_tools, registry_tool
from corral_plugins.tools.service.registry import definition_hash

log = logging.getLogger("corral.tools")


class McpRefresh:
    """Refreshes the tools of MCP servers. The methods open their own units of work."""

    def __init__(self, work: Work, redactor: Redactor, connections: McpConnections) -> None:
        self._work, self._redactor, self._connections = work, redactor, connections

    async def refresh_all(self, entry: UnitContext) -> None:
        """Refresh all enabled servers, one after another."""
        for name in await self._work(_enabled_servers, read=True):
            await self.refresh_server(name, entry)

    async def refresh_server(self, name: str, entry: UnitContext) -> None:
        """Fetch and store the list of a server's tools, or store the reason why the list could not be fetched.

        Do nothing if the server was deleted.
        """
        server = await self._work(lambda: McpServerRow.get_or_none(McpServerRow.name == name), read=True)
        if server is None:
            return
        try:
            tools = await self._connections.list_tools(name, server.url, server.headers_secret)
            listed, rows = await asyncio.to_thread(_names_and_data, name, tools)
        except Exception as failure:  # whatever one server or the client does, the others are refreshed
            detail = self._redactor.redact(_detail_of(failure))
            unexpected = None if isinstance(failure, McpFailure | Problem) else failure
            log.warning(
                "the tools of an MCP server could not be listed",
                extra={"server": name, "detail": detail},
                exc_info=unexpected,
            )
            await self._work(lambda: _store_failure(server, detail), entry=entry)
            return
        await self._work(lambda: _store_tools(server, rows, listed), entry=entry)


def _enabled_servers() -> list[str]:
    query = McpServerRow.select(McpServerRow.name).where(McpServerRow.enabled == True)  # noqa: E712
    return [row.name for row in query.order_by(McpServerRow.name)]


def _names_and_data(server: str, tools: Sequence[McpTool]) -> tuple[ListedTools, dict[str, dict[str, Any]]]:
    """Return a server's tools with the names that Corral gives them, and their database rows, keyed by these names.

    Called in a thread, because definitions may be large.
    """
    listed = listed_tools(server, tools)
    return listed, {tool: _row(server, tool, *found) for tool, found in listed.tools.items()}


def _detail_of(failure: Exception) -> str:
    if isinstance(failure, McpFailure):
        return failure.message
    if isinstance(failure, Problem):
        return failure.detail
    return f"{type(failure).__name__} in Corral or in the plugin that reaches MCP servers; see the log."


def _row(server: str, name: str, remote_name: str, definition: McpDefinition) -> dict[str, Any]:
    return {
        "name": name,
        "server": server,
        "remote_name": remote_name,
        "definition": msgspec.to_builtins(definition),
        "definition_sha256": definition_hash(registry_tool(name, server, remote_name, definition)),
        "is_listed": True,
    }


def _store_failure(server: McpServerRow, detail: str) -> None:
    _update_server(server, last_error=detail[:500])


def _store_tools(server: McpServerRow, rows: dict[str, dict[str, Any]], listed: ListedTools) -> None:
    """Store the tools listed by a server. Except on the first listing, alert admins to new or changed tools.

    Do nothing if the server was changed or deleted in the meantime.
    """
    if not _update_server(server, last_error=None, listed_at=clock.now(), ignored_tools=listed.ignored):
        return
    query = McpToolRow.select(McpToolRow.name, McpToolRow.definition_sha256, McpToolRow.accepted_sha256)
    known = {row.name: row for row in query.where(McpToolRow.server == server.name)}
    of_server = McpToolRow.server == server.name
    McpToolRow.delete().where(of_server & McpToolRow.accepted_sha256.is_null()).execute()
    McpToolRow.update(is_listed=False).where(of_server & McpToolRow.name.not_in(list(rows))).execute()
    changed = []
    for name, row in rows.items():
        before = known.get(name)
        seen = {before.definition_sha256, before.accepted_sha256} if before is not None else set()
        if row["definition_sha256"] not in seen:
            changed.append(name)
        columns = [McpToolRow.remote_name, McpToolRow.definition, McpToolRow.definition_sha256, McpToolRow.is_listed]
        McpToolRow.insert(row).on_conflict(conflict_target=[McpToolRow.name], preserve=columns).execute()
    if changed and server.listed_at is not None:
        _alert_admins(server.name, changed)


def _alert_admins(server: str, tools: list[str]) -> None:
    alert = McpChanged(
        kind="mcp_changed",
        severity="warning",
        title=f"The MCP server {server} changed or added {len(tools)} tools",
        detail=f"Agents cannot use these tools until an admin accepts them. Compare the definitions: `corral mcp show "
        f"{server}`.",
        object={"type": "mcp_server", "id": server},
        server=server,
        tools=tools,
    )
    emit(alert, object=("mcp_server", server))


def _update_server(server: McpServerRow, **values: Any) -> bool:
    unchanged = (McpServerRow.name == server.name) & (McpServerRow.version == server.version)
    return bool(McpServerRow.update(values).where(unchanged).execute())
