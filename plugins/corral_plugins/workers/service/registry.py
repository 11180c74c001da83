"""The `Workers` service: looks up workers for other plugins, and counts the leases of each worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from peewee import SQL

from corral.database.statement import Statement
from corral_plugins.workers.api import WorkerFacts, WorkerTool
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service.liveness import WorkerLiveness
from corral_plugins.workers.service.repository import CAN_CLAIM

FLEET_LIMIT = 1000
TOOL_WORKERS_LIMIT = 200

_FIELDS = WorkerFacts.__struct_fields__
_COLUMNS = [getattr(Worker, "tool_names" if name == "tools" else name) for name in _FIELDS]
_FACTS = Statement(lambda p: Worker.select(*_COLUMNS).where(Worker.id == p("id")).tuples())
_FLEET = Statement(
    lambda p: (
        Worker.select(*_COLUMNS)
        .where(Worker.status == p("status"))
        .order_by(Worker.last_seen_at.desc())
        .limit(FLEET_LIMIT)
        .tuples()
    )
)
_LISTS_TOOLS: Any = SQL("tools <> '[]'")
_TOOLS_OF = Statement(
    lambda p: (
        Worker.select(Worker.id, Worker.name, Worker.tools)
        .where((Worker.id == p("id")) & Worker.is_approved & _LISTS_TOOLS)
        .tuples()
    )
)
_TOOLS = Statement(
    lambda p: (
        Worker.select(Worker.id, Worker.name, Worker.tools)
        .where((Worker.status == "online") & _LISTS_TOOLS)
        .order_by(Worker.name)
        .limit(TOOL_WORKERS_LIMIT)
        .tuples()
    )
)
_LEASE_STARTED = Statement(
    lambda p: Worker.update(active_leases=Worker.active_leases + 1).where(
        (Worker.id == p("id")) & Worker.status.in_(CAN_CLAIM) & (Worker.active_leases < Worker.max_agents)
    )
)
_LEASE_ENDED = Statement(
    lambda p: Worker.update(active_leases=Worker.active_leases - 1).where(
        (Worker.id == p("id")) & (Worker.active_leases > 0)
    )
)


class WorkersService:
    """The implementation of `corral_plugins.workers.api.Workers`."""

    def __init__(self, liveness: WorkerLiveness) -> None:
        self._liveness = liveness

    def find(self, worker_id: str) -> WorkerFacts | None:
        found = _FACTS.one({"id": worker_id})
        return None if found is None else _facts_of_row(found)

    def find_many(self, worker_ids: Sequence[str]) -> dict[str, WorkerFacts]:
        if not worker_ids:
            return {}
        query = Worker.select(*_COLUMNS).where(Worker.id.in_(list(worker_ids)))
        return {facts.id: facts for facts in map(_facts_of_row, Statement(lambda p: query.tuples()).rows({}))}

    def online_workers(self) -> list[WorkerFacts]:
        return [_facts_of_row(found) for found in _FLEET.rows({"status": "online"})]

    def draining_workers(self) -> list[WorkerFacts]:
        return [_facts_of_row(found) for found in _FLEET.rows({"status": "draining"})]

    def tools_of_workers(self, worker_id: str | None = None) -> list[WorkerTool]:
        found = _TOOLS.rows({}) if worker_id is None else _TOOLS_OF.rows({"id": worker_id})
        return [
            WorkerTool(
                worker_id=each,
                worker_name=name,
                name=tool if isinstance(tool, str) else tool["name"],
                schema=None if isinstance(tool, str) else tool.get("schema"),
                risk=None if isinstance(tool, str) else tool.get("risk"),
            )
            for each, name, tools in found
            for tool in msgspec.json.decode(tools)
        ]

    def awaits_first_approval(self) -> bool:
        pending, approved = [
            Worker.select(Worker.id).where(condition).limit(1).tuples().first() is not None
            for condition in (Worker.status == "pending", Worker.is_approved == True)  # noqa: E712  (a column)
        ]
        return pending and not approved

    def take_slot(self, worker_id: str) -> bool:
        return bool(_LEASE_STARTED.run({"id": worker_id}))

    def release_slot(self, worker_id: str) -> None:
        _LEASE_ENDED.run({"id": worker_id})

    def record_contact(self, worker_id: str) -> None:
        self._liveness.record_contact(worker_id)


def _facts_of_row(row: tuple[object, ...]) -> WorkerFacts:
    """Convert a row into `WorkerFacts`.

    The values are decoded here because compiled statements return JSON columns as text, and some database engines
    return booleans as numbers.
    """
    values: dict[str, Any] = dict(zip(_FIELDS, row, strict=True))
    values["labels"] = msgspec.json.decode(values["labels"])
    values["tools"] = None if values["tools"] is None else msgspec.json.decode(values["tools"])
    values["is_approved"], values["embedded"] = bool(values["is_approved"]), bool(values["embedded"])
    return WorkerFacts(**values)
