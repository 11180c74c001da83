"""The registry of all tools.

Tools come from plugins (the `corral_tools` hook), from MCP servers and from workers. Admins can override some values of
a tool.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from corral.database.statement import Statement
from corral.plugin import Contributions, Settings
from corral_plugins.tools.api import MCP_PREFIX, RISK_POLICY, RISKS, TOOL_NAME, Tool, ToolPolicy, ToolRisk
from corral_plugins.tools.models import McpServerRow, McpToolRow, ToolRow
from corral_plugins.tools.service.mcp.connections import McpConnections
from corral_plugins.tools.service.mcp.definitions import McpDefinition, registry_tool
from corral_plugins.tools.settings import TIMEOUT_SECONDS
from corral_plugins.workers.api import Workers, WorkerTool

log = logging.getLogger("corral.tools")

NAME = re.compile(TOOL_NAME)
OWN = "tools"
ANYTHING: dict[str, Any] = {"type": "object"}
HASHED_FIELDS = ("name", "title", "description", "risk", "runs", "schema", "output_schema")
FIELDS = ("name", "version", "enabled", "default_policy", "risk", "timeout_seconds", "config")

_ROW = Statement(lambda p: ToolRow.select(*_override_columns()).where(ToolRow.name == p("name")).tuples())
_ROWS = Statement(lambda p: ToolRow.select(*_override_columns()).order_by(ToolRow.name).tuples())
_MCP_TOOL = Statement(lambda p: _mcp_tools().where(McpToolRow.name == p("name")).tuples())
_MCP_TOOLS = Statement(lambda p: _mcp_tools().order_by(McpToolRow.name).tuples())
_MCP_USABLE = Statement(
    lambda p: (
        McpToolRow.select(McpToolRow.name)
        .join(McpServerRow, on=(McpServerRow.name == McpToolRow.server))
        .where(
            (McpServerRow.enabled == True)  # noqa: E712
            & (McpToolRow.is_listed == True)  # noqa: E712
            & (McpToolRow.accepted_sha256 == McpToolRow.definition_sha256)
        )
        .tuples()
    )
)


def _mcp_tools() -> Any:
    columns = (McpToolRow.name, McpToolRow.server, McpToolRow.remote_name, McpToolRow.definition)
    hashes = (McpToolRow.definition_sha256, McpToolRow.accepted_sha256)
    joined = McpToolRow.select(*columns, *hashes, McpServerRow.enabled).join(
        McpServerRow, on=(McpServerRow.name == McpToolRow.server)
    )
    return joined.where(McpToolRow.is_listed == True)  # noqa: E712


def _override_columns() -> list[Any]:
    return [getattr(ToolRow, name) for name in FIELDS]


class ToolOverrides(msgspec.Struct, frozen=True):
    """The values with which admins override a tool definition. A tool without overrides has version 1."""

    name: str = ""
    version: int = 1
    enabled: bool = True
    default_policy: ToolPolicy | None = None
    risk: ToolRisk | None = None
    timeout_seconds: int | None = None
    config: Mapping[str, Any] | None = None


NO_OVERRIDES = ToolOverrides()


class RegisteredTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool definition, with the values with which admins override it.

    `workers` lists the online workers that offer the tool. `accepted` is false if an admin still has to accept an MCP
    server's definition of the tool.
    """

    definition: Tool
    source: str  # plugin:<name> | mcp:<server> | worker
    overrides: ToolOverrides
    timeout_seconds: int
    workers: tuple[str, ...] = ()
    accepted: bool = True

    @property
    def name(self) -> str:
        """The name of the tool."""
        return self.definition.name

    @property
    def risk(self) -> ToolRisk:
        """The risk that an admin set, or else the risk in the tool definition."""
        return self.overrides.risk or self.definition.risk

    @property
    def default_policy(self) -> ToolPolicy:
        """The policy for agents that have no rule for the tool."""
        return self.overrides.default_policy or RISK_POLICY[self.risk]

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the tool."""
        return self.overrides.config or {}

    @property
    def definition_sha256(self) -> str:
        """A SHA-256 hash of the tool definition. The hash changes when the definition changes."""
        return definition_hash(self.definition)

    @property
    def is_foreign(self) -> bool:
        """Whether the definition comes from outside Corral: from an MCP server or from a worker."""
        return not self.source.startswith("plugin:")


def definition_hash(tool: Tool) -> str:
    """Return a SHA-256 hash of a tool definition, which changes when the definition changes."""
    content = [getattr(tool, name) for name in HASHED_FIELDS]
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


class ToolRegistry:
    """The registry of tools. The methods run in the caller's unit of work."""

    workers: Workers | None

    def __init__(self, contributions: Contributions, settings: Settings, mcp: McpConnections) -> None:
        self._contributions, self._settings, self._mcp = contributions, settings, mcp

    def contributed_tools(self) -> dict[str, tuple[Tool, str]]:
        """Return the tools of active plugins, keyed by name, each with its source.

        If several plugins contribute a tool with the same name, the `tools` plugin takes precedence, followed by the
        plugin whose name comes first in alphabetical order.
        """
        found: dict[str, tuple[Tool, str]] = {}
        contributions = self._contributions.for_hook("corral_tools")
        for plugin, tool in sorted(contributions, key=lambda each: (each[0] != OWN, each[0])):
            found.setdefault(tool.name, (tool, f"plugin:{plugin}"))
        return found

    def log_ignored(self) -> None:
        """Log a warning for each contributed tool that is ignored, with the reason."""
        accepted = self.contributed_tools()
        for plugin, tool in self._contributions.for_hook("corral_tools"):
            if accepted[tool.name] != (tool, f"plugin:{plugin}"):
                log.warning(
                    "contributed tool ignored: another tool has the same name",
                    extra={"plugin": plugin, "tool": tool.name},
                )

    def find_tool(self, name: str, *, worker_id: str | None = None) -> RegisteredTool | None:
        """Return the tool with this name, or None if there is none.

        If neither a plugin nor an MCP server defines the tool, the definition comes from the given worker, or from any
        online worker if `worker_id` is None or the given worker does not offer the tool.
        """
        contributed = self.contributed_tools().get(name)
        if contributed is None and name.startswith(MCP_PREFIX):
            row = _MCP_TOOL.one({"name": name})
            if row is not None:
                found = _ROW.one({"name": name})
                return self._mcp_tool(row, NO_OVERRIDES if found is None else _overrides_of_row(found))
        offered = [] if contributed and contributed[0].runs == "server" else self._tools_of_workers(worker_id, name)
        if contributed is None and not offered and worker_id is not None:
            offered = self._tools_of_workers(None, name)
        if contributed is None and not offered:
            return None
        row = _ROW.one({"name": name})
        tool, source = contributed or (_from_worker(offered[0]), "worker")
        return self._registered_tool(tool, source, NO_OVERRIDES if row is None else _overrides_of_row(row), offered)

    def list_tools(self, *, worker_id: str | None = None) -> list[RegisteredTool]:
        """List all tools, sorted by name.

        The list contains the tools of plugins and MCP servers, and the tools of the given worker, or of all online
        workers if `worker_id` is None.
        """
        overrides = {row[0]: _overrides_of_row(row) for row in _ROWS.rows({})}
        offered: dict[str, list[WorkerTool]] = {}
        for each in self._tools_of_workers(worker_id):
            offered.setdefault(each.name, []).append(each)
        tools = {name: (_from_worker(each[0]), "worker") for name, each in offered.items()} | self.contributed_tools()
        found = {
            name: self._registered_tool(tool, source, overrides.get(name, NO_OVERRIDES), offered.get(name, ()))
            for name, (tool, source) in tools.items()
        }
        for row in _MCP_TOOLS.rows({}):
            found[row[0]] = self._mcp_tool(row, overrides.get(row[0], NO_OVERRIDES))
        return [tool for _, tool in sorted(found.items())]

    def usable_mcp_tools(self) -> list[str]:
        """Return the names of the tools that enabled MCP servers offer and whose definitions an admin has accepted."""
        return [row[0] for row in _MCP_USABLE.rows({})]

    def _mcp_tool(self, row: tuple[Any, ...], overrides: ToolOverrides) -> RegisteredTool:
        name, server, remote_name, definition, observed, accepted, is_enabled = row
        tool = registry_tool(
            name, server, remote_name, msgspec.json.decode(definition, type=McpDefinition), self._mcp.call_tool
        )
        if not is_enabled:
            overrides = msgspec.structs.replace(overrides, enabled=False)
        found = self._registered_tool(tool, f"mcp:{server}", overrides, ())
        return msgspec.structs.replace(found, accepted=observed == accepted)

    def _tools_of_workers(self, worker_id: str | None, name: str | None = None) -> list[WorkerTool]:
        if self.workers is None:
            return []
        return [
            each
            for each in self.workers.tools_of_workers(worker_id)
            if (name is None or each.name == name) and NAME.fullmatch(each.name)
        ]

    def _registered_tool(
        self, definition: Tool, source: str, overrides: ToolOverrides, offered: Iterable[WorkerTool]
    ) -> RegisteredTool:
        seconds = overrides.timeout_seconds or definition.timeout_seconds or self._settings.get(TIMEOUT_SECONDS)
        workers = tuple(dict.fromkeys(each.worker_name for each in offered)) if definition.runs == "worker" else ()
        return RegisteredTool(
            definition=definition, source=source, overrides=overrides, timeout_seconds=seconds, workers=workers
        )


def _overrides_of_row(row: tuple[Any, ...]) -> ToolOverrides:
    """Convert a row into `ToolOverrides`.

    The values must be decoded here, because compiled statements return JSON columns as text and some database engines
    return booleans as numbers.
    """
    values = dict(zip(FIELDS, row, strict=True))
    values["enabled"] = bool(values["enabled"])
    values["config"] = None if values["config"] is None else msgspec.json.decode(values["config"])
    return ToolOverrides(**values)


def _from_worker(offered: WorkerTool) -> Tool:
    """Return the definition of a tool that only workers offer.

    The risk of the tool is at least `external`; the default is `dangerous`.
    """
    risk = offered.risk if offered.risk in RISKS else "dangerous"
    return Tool(
        name=offered.name,
        title=offered.name,
        description="",
        risk="external" if risk in ("read", "write") else risk,
        schema=offered.schema or ANYTHING,
        runs="worker",
        untrusted_output=True,
    )
