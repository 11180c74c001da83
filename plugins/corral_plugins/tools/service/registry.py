"""The tools that there are: of plugins (`corral_tools`) and of workers, with what admins changed of them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from corral.database.statement import Statement
from corral.plugin import Contributions, Settings
from corral_plugins.tools.api import RISKS, Policy, Risk, Tool
from corral_plugins.tools.models import ToolRow
from corral_plugins.tools.service.decision import RISK_POLICY
from corral_plugins.tools.settings import TIMEOUT_SECONDS
from corral_plugins.workers.api import Workers, WorkerTool

log = logging.getLogger("corral.tools")

NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_-]+)+")
OWN = "tools"
ANYTHING: dict[str, Any] = {"type": "object"}
FIELDS = ("name", "version", "enabled", "default_policy", "risk", "timeout_seconds", "config")

_ROW = Statement(lambda p: ToolRow.select(*_columns()).where(ToolRow.name == p("name")).tuples())
_ROWS = Statement(lambda p: ToolRow.select(*_columns()).order_by(ToolRow.name).tuples())


def _columns() -> list[Any]:
    return [getattr(ToolRow, name) for name in FIELDS]


class Changes(msgspec.Struct, frozen=True):
    """What admins changed of a tool. A tool that nobody changed has version 1."""

    name: str = ""
    version: int = 1
    enabled: bool = True
    default_policy: Policy | None = None
    risk: Risk | None = None
    timeout_seconds: int | None = None
    config: Mapping[str, Any] | None = None


UNCHANGED = Changes()


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as it is now. `tool` is its definition; `workers` the names of those online that bring it."""

    tool: Tool
    source: str  # plugin:<name> | worker
    changes: Changes
    timeout_seconds: int
    workers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name."""
        return self.tool.name

    @property
    def risk(self) -> Risk:
        """Its risk, as an admin has set it or as it says itself."""
        return self.changes.risk or self.tool.risk

    @property
    def default_policy(self) -> Policy:
        """What holds where the agent says nothing."""
        return self.changes.default_policy or RISK_POLICY[self.risk]

    @property
    def config(self) -> Mapping[str, Any]:
        """Its configuration."""
        return self.changes.config or {}

    @property
    def definition_sha256(self) -> str:
        """A hash of what the model is told and of what it may do: another one is another tool."""
        tool = self.tool
        told = [tool.name, tool.title, tool.description, tool.risk, tool.runs, tool.schema, tool.output_schema]
        return hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()


class Registry:
    """Joins the caller's unit."""

    workers: Workers | None

    def __init__(self, contributions: Contributions, settings: Settings) -> None:
        self._contributions, self._settings = contributions, settings

    def contributed(self) -> dict[str, tuple[Tool, str]]:
        """The tools of active plugins with their sources, by name. A name that two want is this plugin's, else that of
        the first by plugin name.
        """
        found: dict[str, tuple[Tool, str]] = {}
        told = self._contributions.of("corral_tools")
        for plugin, tool in sorted(told, key=lambda each: (each[0] != OWN, each[0])):
            if NAME.fullmatch(tool.name):
                found.setdefault(tool.name, (tool, f"plugin:{plugin}"))
        return found

    def warn(self) -> None:
        """Say in the log which contributed tools are left out, and why."""
        known = self.contributed()
        for plugin, tool in self._contributions.of("corral_tools"):
            if tool.name not in known:
                log.warning("a tool is left out: its name needs a dot", extra={"plugin": plugin, "tool": tool.name})
            elif known[tool.name] != (tool, f"plugin:{plugin}"):
                log.warning("a tool is left out: its name is taken", extra={"plugin": plugin, "tool": tool.name})

    def find(self, name: str, *, worker_id: str | None = None) -> Known | None:
        """A tool by name; one that only workers bring as this worker has it, or any when none is named."""
        contributed = self.contributed().get(name)
        brought = [] if contributed and contributed[0].runs == "server" else self._brought(worker_id, name)
        if contributed is None and not brought:
            return None
        row = _ROW.one({"name": name})
        tool, source = contributed or (_of_worker(brought[0]), "worker")
        return self._known(tool, source, UNCHANGED if row is None else _changes(row), brought)

    def all(self, *, worker_id: str | None = None) -> list[Known]:
        """Every tool by name: those of plugins, and those that this worker (None: any online) brings."""
        changed = {row[0]: _changes(row) for row in _ROWS.rows({})}
        brought: dict[str, list[WorkerTool]] = {}
        for each in self._brought(worker_id):
            brought.setdefault(each.name, []).append(each)
        tools = {name: (_of_worker(each[0]), "worker") for name, each in brought.items()} | self.contributed()
        return [
            self._known(tool, source, changed.get(name, UNCHANGED), brought.get(name, ()))
            for name, (tool, source) in sorted(tools.items())
        ]

    def _brought(self, worker_id: str | None, name: str | None = None) -> list[WorkerTool]:
        if self.workers is None:
            return []
        return [
            each
            for each in self.workers.tools(worker_id)
            if (name is None or each.name == name) and NAME.fullmatch(each.name)
        ]

    def _known(self, tool: Tool, source: str, changes: Changes, brought: Iterable[WorkerTool]) -> Known:
        seconds = changes.timeout_seconds or tool.timeout_seconds or self._settings.get(TIMEOUT_SECONDS)
        workers = tuple(dict.fromkeys(each.worker_name for each in brought)) if tool.runs == "worker" else ()
        return Known(tool=tool, source=source, changes=changes, timeout_seconds=seconds, workers=workers)


def _changes(row: tuple[Any, ...]) -> Changes:
    """A row of `FIELDS`: JSON is text there, and SQLite's booleans are numbers."""
    values = dict(zip(FIELDS, row, strict=True))
    values["enabled"] = bool(values["enabled"])
    values["config"] = None if values["config"] is None else msgspec.json.decode(values["config"])
    return Changes(**values)


def _of_worker(brought: WorkerTool) -> Tool:
    """A tool that only a worker describes: never less than `external`, `dangerous` when it says nothing."""
    risk = brought.risk if brought.risk in RISKS else "dangerous"
    return Tool(
        name=brought.name,
        title=brought.name,
        description="",
        risk="external" if risk in ("read", "write") else risk,
        schema=brought.schema or ANYTHING,
        runs="worker",
        untrusted_output=True,
    )
