"""The calls of the worker protocol: heartbeats, claims and signals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral.errors import Forbidden, Unavailable
from corral.http.answers import Wait
from corral.metrics.histogram import Histogram
from corral.plugin import Settings
from corral_plugins.tasks.api import CLAIM_TOPICS, SIGNAL_TOPICS, ClaimResponse, Tasks
from corral_plugins.workers import settings as declared
from corral_plugins.workers.api import WorkerOnline, WorkerUpdated
from corral_plugins.workers.models import Worker
from corral_plugins.workers.service import repository
from corral_plugins.workers.service.liveness import WorkerLiveness
from corral_plugins.workers.service.registration import tool_columns
from corral_plugins.workers.shapes import ClaimBody, Heartbeat, HeartbeatReply, WorkerSignals

USAGE = ("cpu_usage_percent", "memory_usage_percent", "disk_usage_percent")
SHORT_HEARTBEAT_SECONDS = 5
QUEUE_DEPTH_SECONDS = 1.0
CLAIM_REASONS = ("ok", "none", "at_capacity", "draining", "budget_exhausted", "kill_switch")


class ClaimMetrics:
    """Counts claim requests by the reason in the response, and measures their durations.

    The methods must be called only on the event loop.
    """

    def __init__(self) -> None:
        self._answers: Counter[str] = Counter()
        self.seconds = Histogram()

    def count_claim(self, reason: str, seconds: float) -> None:
        """Count one claim request once its response is known."""
        self._answers[reason] += 1
        self.seconds.observe(seconds)

    def by_reason(self) -> Mapping[tuple[str, ...], float]:
        """Return the number of claim requests by the reason in their response."""
        return {(reason,): float(self._answers[reason]) for reason in CLAIM_REASONS}


class WorkerProtocol:
    """The service that handles the requests of workers. Its methods run in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, settings: Settings, liveness: WorkerLiveness, metrics: ClaimMetrics) -> None:
        self._settings, self._liveness, self._metrics = settings, liveness, metrics
        self._queue_depth = (0.0, 0)  # time of the last read (monotonic seconds), and the queue depth

    def heartbeat(self, worker_id: str, body: Heartbeat, *, caller: Principal) -> HeartbeatReply:
        """Renew the listed leases of a worker, and store the usage, tools and labels that it reports.

        Raise `Conflict` with the code `invalid_state` if the worker was rejected.
        """
        row = repository.get_worker(worker_id)
        repository.require_worker_or_owner(row, caller)
        if row.status == "rejected":
            raise repository.wrong_status_error(row, "kept alive by heartbeats")
        leases = self.tasks.renew_leases(worker_id, body.leases) if self.tasks is not None and body.leases else []
        row = self._store_heartbeat(row, body)
        return HeartbeatReply(
            server_time=clock.now(),
            status=row.status,
            next_heartbeat_seconds=self._next_heartbeat(row),
            pending_tasks=self._count_pending_tasks() if row.is_approved else 0,
            leases=leases,
            commands=self._commands_for(row, caller),
        )

    def claim(self, worker_id: str, wanted: ClaimBody, *, caller: Principal) -> ClaimResponse | Wait:
        """Claim tasks. Raise `Unavailable` with the code `plugin_disabled` if the `tasks` plugin is not active.

        If no task can be claimed, return a `Wait`, which makes the request wait for tasks until `wanted.poll_deadline`.
        """
        repository.require_own_token(worker_id, caller)
        if self.tasks is None:
            raise Unavailable(
                "The `tasks` plugin is not active; enable the plugin.", code="plugin_disabled", retry_after=60
            )
        began = time.perf_counter()
        self._liveness.record_contact(worker_id)
        agents = None if wanted.agent_ids is None else [each.lower() for each in wanted.agent_ids]
        answer = self.tasks.claim(worker_id, max_tasks=wanted.max_tasks, agent_ids=agents)
        if not answer.tasks and wanted.wait_seconds and clock.time_s() < wanted.poll_deadline:
            # A worker that is at capacity or draining must try again only when one of its own leases changes.
            is_blocked = answer.reason in ("at_capacity", "draining")
            until = wanted.poll_deadline if answer.retry_at is UNSET else clock.parse_instant(answer.retry_at)
            return Wait((worker_id, *(SIGNAL_TOPICS if is_blocked else CLAIM_TOPICS)), min(until, wanted.poll_deadline))
        seconds = time.perf_counter() - began
        after_commit(lambda: self._metrics.count_claim(answer.reason, seconds))
        return answer

    def claimable(self, worker_id: str, limit: int, *, caller: Principal) -> list[Any]:
        """List the tasks that the worker could claim now, in claim order, without claiming a task.

        Raise `Forbidden` unless an admin has approved the worker, and the caller is the worker, the person who
        registered it, or an admin.
        """
        row = repository.get_worker(worker_id)
        repository.require_worker_or_owner(row, caller)
        if not row.is_approved:
            raise Forbidden(
                "No admin has approved this worker yet; ask an admin to approve it.", code=repository.NOT_APPROVED
            )
        if self.tasks is None or row.status not in repository.CAN_CLAIM:
            return []
        return self.tasks.claimable(worker_id, limit=limit)

    def read_signals(
        self, worker_id: str, *, after: int, began: float, wait: int, caller: Principal
    ) -> WorkerSignals | Wait:
        """Return new signals and commands.

        If there are none, return a `Wait`, which makes the request wait for signals until `began + wait` (in seconds
        since the epoch).
        """
        repository.require_own_token(worker_id, caller)
        row = repository.get_worker(worker_id)
        signals = self.tasks.read_signals(worker_id, after=after) if self.tasks is not None else []
        commands = self._commands_for(row, caller)
        is_new = bool(commands) and row.updated_at > clock.format_instant(began)
        if signals or is_new or clock.time_s() >= began + wait:
            return WorkerSignals(signals=signals, commands=commands)
        self._liveness.note_listening(worker_id, began + wait)
        return Wait(self._signal_topics(worker_id), began + wait)

    def _signal_topics(self, worker_id: str) -> tuple[str, ...]:
        """Return the topics of the events about the worker and its tasks. Such events can end a waiting request."""
        if self.tasks is None:
            return (worker_id,)
        held = sorted(lease.task_id for lease in self.tasks.leases_of_worker(worker_id))
        return (worker_id, *held)

    def _store_heartbeat(self, row: Worker, body: Heartbeat) -> Worker:
        """Store the contents of a heartbeat, and set an offline worker to `online`.

        Return the worker's row, which is read again only if an event was published.
        """
        now = clock.now()
        usage = {name: value for name in USAGE if (value := getattr(body, name)) is not UNSET}
        offered: dict[str, Any] = {} if body.labels is UNSET else {"labels": body.labels}
        if body.tools is not UNSET:
            offered |= tool_columns(body.tools)
        changed = {name: value for name, value in offered.items() if getattr(row, name) != value}
        beat = {**usage, "last_heartbeat_at": now, "last_seen_at": now}
        if not changed:
            Worker.update(**beat).where(Worker.id == row.id).execute()
        elif (updated := repository.change_and_read_worker(Worker.id == row.id, **beat, **changed)) is not None:
            row, fields = updated, sorted(changed.keys() - {"tool_names"})
            repository.publish_worker_event(WorkerUpdated, row, changed_fields=fields)
        if row.status == "offline" and (online := repository.bring_online(row.id)) is not None:
            row = online
            repository.publish_worker_event(WorkerOnline, row)
        return row

    def _next_heartbeat(self, row: Worker) -> int:
        """Return the number of seconds until the next heartbeat.

        The value is at most 5 s if the worker has leases but is not waiting for signals, because a cancellation would
        otherwise reach the worker too late.
        """
        usual = declared.heartbeat_seconds(self._settings)
        if row.active_leases and not self._liveness.is_listening(row.id):
            return min(usual, SHORT_HEARTBEAT_SECONDS)
        return usual

    def _commands_for(self, row: Worker, caller: Principal) -> list[str]:
        """Return the commands for a worker.

        `resume` and `config_changed` are sent for two heartbeat intervals, because a response may be lost.
        """
        since = clock.now(-2 * self._settings.get(declared.HEARTBEAT_SECONDS))
        due = {
            "drain": row.status == "draining",
            "resume": row.status != "draining" and row.resumed_at > since,
            "config_changed": row.configured_at > since,
            # A token expires only after an admin has rotated it.
            "reregister": caller.kind == "worker" and caller.expires_at is not None,
        }
        return [command for command, is_due in due.items() if is_due]

    def _count_pending_tasks(self) -> int:
        """Return the number of pending tasks, which is read from the database at most once per second."""
        if self.tasks is None:
            return 0
        read_at, depth = self._queue_depth
        if time.monotonic() - read_at > QUEUE_DEPTH_SECONDS:
            depth = self.tasks.queue_statistics().depth
            self._queue_depth = (time.monotonic(), depth)
        return depth
