"""The `Tasks` service, which other plugins call. It delegates to the other modules of this plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.errors import NotFound
from corral.http.answers import ANY_VERSION
from corral_plugins.tasks.api import (
    DIRECT_ORIGIN,
    AttemptSummary,
    ClaimResponse,
    LeaseFacts,
    LeaseRef,
    LeaseSignal,
    LeaseState,
    LeaseView,
    LiveAttempt,
    NewTask,
    Origin,
    QueueStatistics,
    Run,
    TaskOverrides,
    TaskUpdated,
)
from corral_plugins.tasks.models import Task
from corral_plugins.tasks.service import dead_letters, rows, run_reports
from corral_plugins.tasks.service.actions import OwnerActions
from corral_plugins.tasks.service.claims import TaskClaims
from corral_plugins.tasks.service.creation import TaskCreation
from corral_plugins.tasks.service.dead_letters import TaskDeadLetters
from corral_plugins.tasks.service.leases import TaskLeases
from corral_plugins.tasks.service.reviews import TaskReviews
from corral_plugins.tasks.service.rows import TaskViews, find_readable_task
from corral_plugins.tasks.service.runs import TaskRuns, is_held_for
from corral_plugins.tasks.service.transitions import publish_task_event, queue_key, requeue_waiting
from corral_plugins.tasks.shapes import TaskView
from corral_plugins.tasks.worker_protocol_shapes import UsageTotals


class TasksService:
    """Implements `corral_plugins.tasks.api.Tasks`."""

    def __init__(
        self,
        creation: TaskCreation,
        actions: OwnerActions,
        claims: TaskClaims,
        leases: TaskLeases,
        runs: TaskRuns,
        views: TaskViews,
        dead_letters: TaskDeadLetters,
        reviews: TaskReviews,
    ) -> None:
        self._creation, self._actions, self._claims, self._leases, self._views = (
            creation,
            actions,
            claims,
            leases,
            views,
        )
        self._runs, self._dead_letters, self._reviews = runs, dead_letters, reviews

    def create(
        self, new: NewTask, *, by: Principal, source: dict[str, Any] | None = None, origin: Origin = DIRECT_ORIGIN
    ) -> TaskView:
        return _decode_view(self._creation.create(new, by=by, source=source, origin=origin).body)

    def get(self, task_id: str, *, by: Principal) -> TaskView:
        find_readable_task(task_id, by)
        return _decode_view(self._views.encoded_task(task_id).body)

    def cancel(self, task_id: str, *, by: Principal, reason: str | None = None) -> TaskView:
        return _decode_view(self._actions.cancel(task_id, by=by, reason=reason).body)

    def retry(
        self,
        task_id: str,
        *,
        by: Principal,
        source: str,
        reason: str | None = None,
        from_checkpoint: bool = True,
        overrides: TaskOverrides | None = None,
    ) -> TaskView:
        return _decode_view(
            self._actions.retry(
                task_id,
                ANY_VERSION,
                by=by,
                from_checkpoint=from_checkpoint,
                reason=reason,
                source=source,
                overrides=overrides,
            ).body
        )

    def give_up(self, task_id: str, *, by: Principal, message: str) -> str:
        return self._actions.give_up(task_id, by=by, message=message)

    def add_missing_dead_letters(self, after: str) -> str | None:
        return self._dead_letters.add_missing(after)

    def attempts_between(self, task_id: str, *, after_fence: int, until_fence: int) -> list[AttemptSummary]:
        return dead_letters.attempts_between(task_id, after_fence=after_fence, until_fence=until_fence)

    def statuses(self, task_ids: Sequence[str]) -> dict[str, tuple[str, str | None]]:
        return dead_letters.statuses_of(task_ids)

    def lock(self, task_id: str) -> bool:
        try:
            rows.lock_task(task_id)
        except NotFound:
            return False
        return True

    def resume(self, task_id: str, *, kind: str, given: dict[str, Any], id: str | None = None) -> bool:
        try:
            row = rows.lock_task(task_id)
        except NotFound:
            return False
        if row.status != "waiting" or row.waiting_kind != kind:
            return False
        if id is not None and row.get("waiting_for").get("id") != id:
            return False
        requeue_waiting(row, rows.to_json_text(given))
        return True

    def end_review(self, task_id: str, review_id: str, *, approved: bool, message: str) -> bool:
        return self._reviews.end(task_id, review_id, approved=approved, message=message)

    def replace_review(self, task_id: str, review_id: str, new_id: str) -> bool:
        return self._reviews.replace(task_id, review_id, new_id)

    def claim(self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None) -> ClaimResponse:
        return self._claims.claim(worker_id, max_tasks=max_tasks, agent_ids=agent_ids)

    def claimable(self, worker_id: str, *, limit: int) -> list[Any]:
        ids = self._claims.claimable(worker_id, limit=limit)
        return self._views.encoded_items([(task_id, 0) for task_id in ids])

    def renew_leases(self, worker_id: str, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        return self._leases.renew_leases(worker_id, leases)

    def leases_of_worker(self, worker_id: str) -> list[LeaseView]:
        return self._leases.leases_of_worker(worker_id)

    def read_signals(self, worker_id: str, *, after: int) -> list[LeaseSignal]:
        return self._leases.read_signals(worker_id, after=after)

    def release_leases_of_worker(self, worker_id: str, *, reason: str) -> int:
        return self._leases.release_leases_of_worker(worker_id, reason=reason)

    def release_leases_of_agent(self, agent_id: str, *, cancel: bool, reason: str) -> list[str]:
        return self._leases.release_leases_of_agent(agent_id, cancel=cancel, reason=reason)

    def cancel_all_leased(self, *, reason: str) -> int:
        return self._leases.cancel_all_leased(reason=reason)

    def detach_agent(self, agent_id: str) -> int:
        """Allow other agents to claim the tasks that waited for a deleted agent.

        Implements `Tasks.detach_agent`.
        """
        waiting = (Task.agent_id == agent_id) & Task.finished_at.is_null()
        found = rows.lock_tasks(waiting, 500)
        for row in found:
            key = queue_key(None, row.agent_role, rows.parse_json_text(row.required_tools))
            queue = key if row.queue == row.queue_key else row.queue
            rows.change_task(row, {"agent_id": None, "queue_key": key, "queue": queue})
            publish_task_event(TaskUpdated, row, row.status)
        return len(found)

    def leased_task_ids(self, agent_ids: Sequence[str]) -> dict[str, list[str]]:
        return self._leases.leased_task_ids(agent_ids)

    def live_lease(self, task_id: str, lease_id: str) -> LeaseView | None:
        return self._leases.live_lease(task_id, lease_id)

    def live_attempt(self, task_id: str, lease_id: str) -> LiveAttempt | None:
        return self._leases.live_attempt(task_id, lease_id)

    def stop_run(self, task_id: str, lease_id: str, *, kind: str, reason: str | None) -> bool:
        return self._runs.stop(task_id, lease_id, kind=kind, reason=reason)

    def record_shortage(self, task_id: str, lease_id: str, *, scope: str, needed_micro: int, left_micro: int) -> None:
        self._runs.record_shortage(task_id, lease_id, scope=scope, needed_micro=needed_micro, left_micro=left_micro)

    def lock_run(self, task_id: str, lease_id: str | None, *, by: Principal) -> Run:
        return self._runs.lock_run(task_id, lease_id, by=by)

    def lock_held_run(self, task_id: str, lease_id: str, *, approval_id: str) -> Run:
        return self._runs.lock_held_run(task_id, lease_id, approval_id)

    def is_held(self, task_id: str, lease_id: str, *, approval_id: str) -> bool:
        row = rows.find_task(task_id)
        return row is not None and is_held_for(row, lease_id, approval_id)

    def find_run(self, task_id: str) -> Run | None:
        return self._runs.find_run(task_id)

    def taint_run(self, task_id: str, lease_id: str, sources: Sequence[str]) -> bool:
        return self._runs.taint(task_id, lease_id, sources)

    def fail_run(self, task_id: str, lease_id: str, *, type: str, message: str) -> None:
        self._runs.fail_run(task_id, lease_id, type=type, message=message)

    def lease_facts(self, task_id: str, lease_id: str) -> LeaseFacts | None:
        return self._leases.lease_facts(task_id, lease_id)

    def lease_states(self, leases: Sequence[LeaseRef]) -> list[LeaseState]:
        return self._leases.lease_states(leases)

    def renew_lease(self, task_id: str, lease_id: str) -> None:
        self._leases.renew_lease(task_id, lease_id)

    def record_usage(
        self, task_id: str, lease_id: str, *, input_tokens: int, output_tokens: int, cost_usd: float | None = None
    ) -> None:
        used = UsageTotals(input_tokens=input_tokens, output_tokens=output_tokens, calls=1)
        if cost_usd is not None:
            used.cost_usd = cost_usd
        if run_reports.add_gateway_usage(task_id, lease_id, used):
            self._runs.stop(task_id, lease_id, kind="budget", reason=None)

    def queue_statistics(self) -> QueueStatistics:
        return self._leases.queue_statistics()


def _decode_view(body: bytes) -> TaskView:
    return msgspec.json.decode(body, type=TaskView)
