"""What other plugins ask about workers: facts, places for leases, signs of life."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from peewee import SQL

from corral.database.statement import Statement
from corral_plugins.workers.api import WorkerFacts, WorkerTool
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import rows
from corral_plugins.workers.service.presence import Presence

FLEET_LIMIT = 1000
BRINGERS_LIMIT = 200

_FLEET = Statement(
    lambda p: (
        Worker.select(*rows.FACTS_COLUMNS)
        .where(Worker.status == "online")
        .order_by(Worker.last_seen_at.desc())
        .limit(FLEET_LIMIT)
        .tuples()
    )
)
_BRINGS: Any = SQL("tools <> '[]'")
_TOOLS_OF = Statement(
    lambda p: (
        Worker.select(Worker.id, Worker.name, Worker.tools)
        .where((Worker.id == p("id")) & Worker.is_approved & _BRINGS)
        .tuples()
    )
)
_TOOLS = Statement(
    lambda p: (
        Worker.select(Worker.id, Worker.name, Worker.tools)
        .where((Worker.status == "online") & _BRINGS)
        .order_by(Worker.name)
        .limit(BRINGERS_LIMIT)
        .tuples()
    )
)
_STARTED = Statement(
    lambda p: Worker.update(active_leases=Worker.active_leases + 1).where(
        (Worker.id == p("id")) & Worker.status.in_(rows.PRESENT) & (Worker.active_leases < Worker.max_agents)
    )
)
_ENDED = Statement(
    lambda p: Worker.update(active_leases=Worker.active_leases - 1).where(
        (Worker.id == p("id")) & (Worker.active_leases > 0)
    )
)


class Roster:
    """Implements `corral_plugins.workers.api.Workers`."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence

    def facts(self, worker_id: str) -> WorkerFacts | None:
        found = rows.FACTS.one({"id": worker_id})
        return None if found is None else _facts(found)

    def facts_of(self, worker_ids: Sequence[str]) -> dict[str, WorkerFacts]:
        if not worker_ids:
            return {}
        query = Worker.select(*rows.FACTS_COLUMNS).where(Worker.id.in_(list(worker_ids)))
        return {facts.id: facts for facts in map(_facts, Statement(lambda p: query.tuples()).rows({}))}

    def fleet(self) -> list[WorkerFacts]:
        return [_facts(found) for found in _FLEET.rows({})]

    def tools(self, worker_id: str | None = None) -> list[WorkerTool]:
        found = _TOOLS.rows({}) if worker_id is None else _TOOLS_OF.rows({"id": worker_id})
        return [
            WorkerTool(
                worker_id=each,
                worker_name=name,
                name=offer if isinstance(offer, str) else offer["name"],
                schema=None if isinstance(offer, str) else offer.get("schema"),
                risk=None if isinstance(offer, str) else offer.get("risk"),
            )
            for each, name, tools in found
            for offer in msgspec.json.decode(tools)
        ]

    def awaits_approval(self) -> bool:
        pending, approved = [
            Worker.select(Worker.id).where(condition).limit(1).tuples().first() is not None
            for condition in (Worker.status == "pending", Worker.is_approved == True)  # noqa: E712  (a column)
        ]
        return pending and not approved

    def lease_started(self, worker_id: str) -> bool:
        return bool(_STARTED.run({"id": worker_id}))

    def lease_ended(self, worker_id: str) -> None:
        _ENDED.run({"id": worker_id})

    def alive(self, worker_id: str) -> None:
        self._presence.alive(worker_id)


def _facts(found: tuple[object, ...]) -> WorkerFacts:
    """JSON columns of compiled statements are text, and SQLite's booleans are numbers."""
    names = (
        "id",
        "name",
        "status",
        "is_approved",
        "group",
        "labels",
        "tools",
        "max_agents",
        "active_leases",
        "embedded",
    )
    values = dict(zip(names, found, strict=True))
    values["labels"] = msgspec.json.decode(str(values["labels"]))
    values["tools"] = msgspec.json.decode(str(values["tools"]))
    values["is_approved"], values["embedded"] = bool(values["is_approved"]), bool(values["embedded"])
    return WorkerFacts(**values)  # type: ignore[arg-type]  # by name, as selected
