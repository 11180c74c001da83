"""The public API of workers: shapes, the service `Workers` and events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes({"worker_not_approved": (403, "The worker is not approved")}, limiting=True)


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a worker that claims and other plugins need."""

    id: str
    name: str
    status: str  # pending | online | offline | draining | rejected
    is_approved: bool
    group: str | None
    labels: dict[str, str]
    tools: list[str]  # empty: unknown, so the worker is taken to offer every tool
    max_agents: int
    active_leases: int
    embedded: bool

    @property
    def claims(self) -> bool:
        """Whether the worker may take work now, apart from its capacity."""
        return self.is_approved and self.status in ("online", "offline")  # claiming brings an offline worker online


class WorkerTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that a worker offers; `schema` and `risk` are None if the worker gave only the name."""

    worker_id: str
    worker_name: str
    name: str
    schema: dict[str, Any] | None
    risk: str | None


class Workers(Protocol):
    """Workers, for other plugins. Joins the caller's unit. Lock order: task, then agent, then worker."""

    def facts(self, worker_id: str) -> WorkerFacts | None:
        """Return a worker, or None."""
        ...

    def facts_of(self, worker_ids: Sequence[str]) -> dict[str, WorkerFacts]:
        """Return workers by id, in one query."""
        ...

    def fleet(self) -> list[WorkerFacts]:
        """List the workers that are online, at most 1,000."""
        ...

    def tools(self, worker_id: str | None = None) -> list[WorkerTool]:
        """List the tools that an approved worker offers, or without `worker_id` those of at most 200 online workers.

        Workers that list no tools are left out, although they are taken to offer every tool.
        """
        ...

    def awaits_approval(self) -> bool:
        """Whether a worker waits for approval while none is approved."""
        ...

    def lease_started(self, worker_id: str) -> bool:
        """Count one more lease, by one guarded update. False: the worker is full, draining or not approved."""
        ...

    def lease_ended(self, worker_id: str) -> None:
        """Count one lease less."""
        ...

    def alive(self, worker_id: str) -> None:
        """Record that the worker was in contact; written at most every 5 s. Brings an `offline` worker `online`."""
        ...


class WorkerEvent(Event, kw_only=True):
    """The fields of every worker event."""

    worker_id: str
    name: str
    group: str | None
    status: str


class WorkerRegistered(WorkerEvent, kw_only=True):
    """A worker registered, for the first time or again."""

    event = "worker.registered"


class WorkerApproved(WorkerEvent, kw_only=True):
    """A worker was approved."""

    event = "worker.approved"


class WorkerRejected(WorkerEvent, kw_only=True):
    """A worker was rejected, or its approval was withdrawn."""

    event = "worker.rejected"


class WorkerOnline(WorkerEvent, kw_only=True):
    """A worker came online."""

    event = "worker.online"


class WorkerOffline(WorkerEvent, kw_only=True):
    """A worker went offline after `workers.offline_after_seconds` of silence. Its leases expire on their own."""

    event = "worker.offline"

    last_heartbeat_at: str | None
    leases: int


class WorkerDraining(WorkerEvent, kw_only=True):
    """A worker started draining and claims no more tasks."""

    event = "worker.draining"


class WorkerUpdated(WorkerEvent, kw_only=True):
    """A worker was changed or resumed, or reported different tools or labels."""

    event = "worker.updated"

    changed_fields: list[str]


class WorkerDeleted(WorkerEvent, kw_only=True):
    """A worker was deleted or deregistered."""

    event = "worker.deleted"


EVENTS: tuple[type[Event], ...] = (
    WorkerRegistered,
    WorkerApproved,
    WorkerRejected,
    WorkerOnline,
    WorkerOffline,
    WorkerDraining,
    WorkerUpdated,
    WorkerDeleted,
)
