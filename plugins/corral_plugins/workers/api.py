"""The public API of the `workers` plugin: data classes, the `Workers` service, and events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "worker_not_approved": (
            403,
            "The worker is not approved",
            "Ask an admin to approve the worker with `corral workers approve NAME`.",
        )
    },
    limiting=True,
)


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a worker that other plugins need, for example to assign tasks to the worker."""

    id: str
    name: str
    status: str  # pending | online | offline | draining | rejected
    is_approved: bool
    group: str | None
    labels: dict[str, str]
    tools: list[str] | None  # None: the worker did not report its tools and is assumed to offer every tool
    max_agents: int
    active_leases: int
    embedded: bool

    @property
    def can_claim(self) -> bool:
        """Whether the worker may claim tasks now, regardless of its free capacity."""
        return self.is_approved and self.status in ("online", "offline")  # a claim sets an offline worker to `online`

    def offers(self, tool: str) -> bool:
        """Return whether the worker offers the tool."""
        return self.tools is None or tool in self.tools


class WorkerTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that a worker offers. `schema` and `risk` are None if the worker reported only the name."""

    worker_id: str
    worker_name: str
    name: str
    schema: dict[str, Any] | None
    risk: str | None


class Workers(Protocol):
    """The service that the `workers` plugin offers to other plugins. Its methods run in the caller's unit of work.

    Locks are acquired in this order: task, agent, worker.
    """

    def find(self, worker_id: str) -> WorkerFacts | None:
        """Return a worker, or None if it does not exist."""
        ...

    def find_many(self, worker_ids: Sequence[str]) -> dict[str, WorkerFacts]:
        """Return the workers with the given ids as a dictionary keyed by id. All workers are read in one query."""
        ...

    def online_workers(self) -> list[WorkerFacts]:
        """Return at most 1,000 online workers."""
        ...

    def draining_workers(self) -> list[WorkerFacts]:
        """Return at most 1,000 draining workers."""
        ...

    def tools_of_workers(self, worker_id: str | None = None) -> list[WorkerTool]:
        """Return the tools of the given approved worker, or by default those of at most 200 online workers.

        Workers that did not report their tools are assumed to offer every tool, but are omitted here.
        """
        ...

    def awaits_first_approval(self) -> bool:
        """Return whether a worker is waiting for approval and no worker is approved."""
        ...

    def take_slot(self, worker_id: str) -> bool:
        """Increment a worker's lease count with a single conditional UPDATE.

        Return False and change nothing if the worker is at capacity, draining or not approved.
        """
        ...

    def release_slot(self, worker_id: str) -> None:
        """Decrement a worker's lease count."""
        ...

    def record_contact(self, worker_id: str) -> None:
        """Record, at most once every 5 s, that the worker made a call. An `offline` worker becomes `online`."""
        ...


class WorkerEvent(Event, kw_only=True):
    """The base class of worker events, with their common fields."""

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
    """A worker went offline because it made no calls for `workers.offline_after_seconds`.

    The worker keeps its leases until they expire.
    """

    event = "worker.offline"

    last_heartbeat_at: str | None
    leases: int


class WorkerDraining(WorkerEvent, kw_only=True):
    """A worker started draining. A draining worker claims no more tasks."""

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
