"""What a worker hears: the answer to heartbeats, signals, and the work it could take."""

from __future__ import annotations

import time
from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Forbidden
from corral.http.answers import Wait
from corral.plugin import Settings
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerOnline, WorkerUpdated
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import rows
from corral_plugins.workers.service.presence import Presence
from corral_plugins.workers.service.registration import offers
from corral_plugins.workers.service.shapes import Heartbeat, HeartbeatReply, Signals
from corral_plugins.workers.service.tokens import NOT_APPROVED

FIGURES = ("cpu_usage_percent", "memory_usage_percent", "disk_usage_percent")
WATCHFUL_SECONDS = 5
DEPTH_SECONDS = 1.0


class Heartbeats:
    """One a kernel."""

    tasks: Tasks | None

    def __init__(self, settings: Settings, presence: Presence) -> None:
        self._settings, self._presence = settings, presence
        self._depth = (0.0, 0)

    def beat(self, worker_id: str, told: Heartbeat, *, caller: Principal) -> HeartbeatReply:
        """Renew the leases, keep the figures, answer what the worker must know. `invalid_state`: it is rejected."""
        row = rows.get(worker_id)
        rows.require_own(row, caller)
        if row.status == "rejected":
            raise rows.refuse(row, "kept alive: an admin has rejected it")
        leases = self.tasks.renew(worker_id, told.leases) if self.tasks is not None and told.leases else []
        self._keep(row, told)
        return HeartbeatReply(
            server_time=clock.now(),
            status=row.status,
            next_heartbeat_seconds=self._next(row),
            pending_tasks=self._pending() if row.is_approved else 0,
            leases=leases,
            commands=self._commands(row, caller),
        )

    def claimable(self, worker_id: str, limit: int, *, caller: Principal) -> list[Any]:
        """The tasks that it could claim now, in the order of the claim; changes nothing."""
        row = rows.get(worker_id)
        rows.require_own(row, caller)
        if not row.is_approved:
            raise Forbidden("An admin has not approved this worker.", code=NOT_APPROVED)
        if self.tasks is None or row.status not in rows.PRESENT:
            return []
        return self.tasks.claimable(worker_id, limit=limit)

    def signals(self, worker_id: str, *, after: int, began: float, wait: int, caller: Principal) -> Signals | Wait:
        """What it must hear; a `Wait` while there is nothing, until `began + wait` (epoch seconds)."""
        rows.require_self(worker_id, caller)
        row = rows.get(worker_id)
        found = self.tasks.signals(worker_id, after=after) if self.tasks is not None else []
        commands = self._commands(row, caller)
        is_news = bool(commands) and row.updated_at > clock.format_instant(began)
        if found or is_news or clock.time_s() >= began + wait:
            return Signals(signals=found, commands=commands)
        self._presence.listens(worker_id, began + wait)
        return Wait(self._topics(worker_id), began + wait)

    def _topics(self, worker_id: str) -> tuple[str, ...]:
        """Its own events, what it does itself (a claim brings another task), and those of its tasks."""
        if self.tasks is None:
            return (worker_id,)
        held = sorted(lease.task_id for lease in self.tasks.leases_of_worker(worker_id))
        return (worker_id, *held)

    def _keep(self, row: Worker, told: Heartbeat) -> None:
        """Write what was told; `row.status` is then as written."""
        now = clock.now()
        figures = {name: value for name in FIGURES if (value := getattr(told, name)) is not UNSET}
        offered: dict[str, Any] = {} if told.labels is UNSET else {"labels": told.labels}
        if isinstance(told.tools, list):
            offered |= offers(told.tools)
        changed = {name: value for name, value in offered.items() if getattr(row, name) != value}
        beat = {**figures, "last_heartbeat_at": now, "last_seen_at": now}
        if changed:
            rows.change(Worker.id == row.id, **beat, **changed)
            rows.tell(WorkerUpdated, row, changed_fields=sorted(changed.keys() - {"tool_names"}))
        else:
            Worker.update(**beat).where(Worker.id == row.id).execute()
        if row.status == "offline" and rows.change(
            (Worker.id == row.id) & (Worker.status == "offline"), status="online"
        ):
            row.status = "online"
            rows.tell(WorkerOnline, row)

    def _next(self, row: Worker) -> int:
        """Shorter while a stop could not reach it otherwise."""
        usual = declared.heartbeat(self._settings)
        if row.active_leases and not self._presence.is_listening(row.id):
            return min(usual, WATCHFUL_SECONDS)
        return usual

    def _commands(self, row: Worker, caller: Principal) -> list[str]:
        """`resume` and `config_changed` are repeated for two heartbeats, so that a lost answer loses nothing."""
        since = clock.now(-2 * self._settings.get(declared.HEARTBEAT_SECONDS))
        told = {
            "drain": row.status == "draining",
            "resume": row.status != "draining" and row.resumed_at > since,
            "config_changed": row.configured_at > since,
            # Only a token that an admin has replaced has an end.
            "reregister": caller.kind == "worker" and caller.expires_at is not None,
        }
        return [command for command, is_due in told.items() if is_due]

    def _pending(self) -> int:
        """How many tasks wait; asked for at most once a second, whatever the number of workers."""
        if self.tasks is None:
            return 0
        read_at, depth = self._depth
        if time.monotonic() - read_at > DEPTH_SECONDS:
            depth = self.tasks.queue_figures().depth
            self._depth = (time.monotonic(), depth)
        return depth
