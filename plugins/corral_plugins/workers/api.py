"""What other plugins may know of workers: shapes and the service `Workers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from corral.errors import declare_codes
from corral.events.event import Event

declare_codes({"worker_not_approved": (403, "The worker is not approved")}, limiting=True)


class WorkerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as claims need it."""

    id: str
    name: str
    status: str  # pending | online | offline | draining | rejected
    is_approved: bool
    group: str | None
    labels: dict[str, str]
    tools: list[str]  # empty: all that its agents need
    max_agents: int
    active_leases: int
    embedded: bool

    @property
    def claims(self) -> bool:
        """Whether it may take work now, capacity aside."""
        return self.is_approved and self.status in ("online", "offline")  # any call brings an offline one back


class WorkerTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that a worker brings; `schema` and `risk` are null when it told only the name."""

    worker_id: str
    worker_name: str
    name: str
    schema: dict[str, Any] | None
    risk: str | None


class Workers(Protocol):
    """Joins the caller's unit. Lock order: task, then agent, then worker."""

    def facts(self, worker_id: str) -> WorkerFacts | None:
        """A worker; None when there is none."""
        ...

    def facts_of(self, worker_ids: Sequence[str]) -> dict[str, WorkerFacts]:
        """Workers by id, in one query."""
        ...

    def fleet(self) -> list[WorkerFacts]:
        """Every approved worker that is online, at most 1,000; for explanations."""
        ...

    def tools(self, worker_id: str | None = None) -> list[WorkerTool]:
        """What an approved worker brings; None: those online, at most 200.

        Those that list none bring all that is needed.
        """
        ...

    def awaits_approval(self) -> bool:
        """Whether some worker waits for approval and none is approved; for explanations."""
        ...

    def lease_started(self, worker_id: str) -> bool:
        """Take a place by one guarded update (approved, not draining, below `max_agents`); False: it has none."""
        ...

    def lease_ended(self, worker_id: str) -> None:
        """Give the place back."""
        ...

    def alive(self, worker_id: str) -> None:
        """A sign of life; writes at most every 5 s. Brings an `offline` worker `online` with its event."""
        ...


class WorkerEvent(Event, kw_only=True):
    """What every event of a worker carries."""

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
    """A worker was rejected, or its approval withdrawn."""

    event = "worker.rejected"


class WorkerOnline(WorkerEvent, kw_only=True):
    """A worker came online."""

    event = "worker.online"


class WorkerOffline(WorkerEvent, kw_only=True):
    """A worker has been silent for too long. Its leases end by themselves."""

    event = "worker.offline"

    last_heartbeat_at: str | None
    leases: int


class WorkerDraining(WorkerEvent, kw_only=True):
    """A worker takes no more work."""

    event = "worker.draining"


class WorkerUpdated(WorkerEvent, kw_only=True):
    """A worker was changed or resumed, or offers other tools or labels."""

    event = "worker.updated"

    changed_fields: list[str]


class WorkerDeleted(WorkerEvent, kw_only=True):
    """A worker was removed, or left by itself."""

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
