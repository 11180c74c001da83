"""The calls that workers and tools make for task runs, under the leases of these runs.

Each call checks the lease first. A call with a stale lease has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Conflict, FieldError, Forbidden, Invalid, NotFound, Unavailable
from corral.http.answers import Encoded
from corral.ids import new_id
from corral.schema.conversion import convert
from corral.schema.json_schema_validation import check_user_schema
from corral_plugins.approvals.api import Approvals, NewApproval
from corral_plugins.code_reviews.api import PreparedPatch
from corral_plugins.files.api import Files
from corral_plugins.secrets.api import SecretDelivery, Secrets
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import Run, TaskProgressed, TaskStalled, TaskStarted, TaskWaiting
from corral_plugins.tasks.models import Attempt, AttemptRow, TaskRow
from corral_plugins.tasks.service import rows, statistics
from corral_plugins.tasks.service.agent_models import AgentModels
from corral_plugins.tasks.service.claim_budgets import RefusedCall, find_refused_call, with_refused_call
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.reviews import TaskReviews
from corral_plugins.tasks.service.run_reports import UsageReports, has_reached_cost_limit
from corral_plugins.tasks.service.transitions import (
    NOT_CANCELLED,
    TaskTransitions,
    publish_task_event,
    requeue_columns,
    task_error,
    transition,
)
from corral_plugins.tasks.worker_protocol_shapes import (
    MAX_ARTIFACTS,
    Artifact,
    AskedInput,
    CancellationReport,
    CheckpointAccepted,
    CheckpointReport,
    CompletionReport,
    FailureReport,
    LeaseRenewal,
    ProgressReport,
    ReleaseReport,
    StartedResponse,
    UsageReport,
    WaitReport,
)

STATE_LIMIT, RESULT_LIMIT = 1024 * 1024, 256 * 1024

BUDGET_EXCEEDED = "budget_exceeded"  # the reason with which workers release a task whose call a budget refused
BUDGET_DELAY_SECONDS = 5
"""The delay before a task can be claimed again after one of its calls was refused because of a budget.

Without the delay, the task could be claimed and released in a busy loop, because a claim reserves only an estimate.
"""
CIRCUIT_OPEN = "circuit_open"  # the reason with which workers release a task that met an open circuit breaker

_TAINTED = Statement(lambda p: Attempt.select(Attempt.tainted).where(Attempt.id == p("id")).tuples())


class TaskRuns:
    """Implements the calls that are made under a lease. Every method runs in the caller's unit of work.

    The caller must hold the lease that `lease_id` names.
    """

    approvals: Approvals | None
    files: Files | None
    secrets: Secrets | None

    def __init__(
        self,
        transitions: TaskTransitions,
        outcomes: TaskOutcomes,
        usages: UsageReports,
        models: AgentModels,
        reviews: TaskReviews,
    ) -> None:
        self._transitions, self._outcomes, self._usages, self._settings = (
            transitions,
            outcomes,
            usages,
            transitions.settings,
        )
        self._models, self._reviews = models, reviews

    # -- the lease of a call

    def lock_leased_task(self, task_id: str, lease_id: str | None, by: Principal) -> tuple[TaskRow, AttemptRow]:
        """Lock a task. Return the task and its live attempt.

        Raise `Conflict` with the code `lease_lost` if the lease is not live.
        """
        row, attempt = self._lock_attempt(task_id, lease_id, by)
        if attempt.finished_at is not None or row.lease_id != attempt.lease_id:
            raise self._transitions.stale_call_error()
        return row, attempt

    def _lock_attempt(self, task_id: str, lease_id: str | None, by: Principal) -> tuple[TaskRow, AttemptRow]:
        """Lock a task. Return the task and the attempt of the lease, even if the lease has ended.

        Raise `Forbidden` if another worker holds the lease.
        """
        row = rows.lock_task(task_id)
        attempt = rows.find_attempt(lease_id) if lease_id is not None else None
        if attempt is None or attempt.task_id != task_id:
            raise self._transitions.stale_call_error()
        if by.worker_id != attempt.worker_id and by.lease_id != attempt.lease_id:
            raise Forbidden("This lease is held by another worker.")
        return row, attempt

    def _lock_for_end_report(
        self, task_id: str, lease_id: str | None, by: Principal, call: str
    ) -> tuple[TaskRow, AttemptRow, bool]:
        """Lock the task for a call that ends the lease.

        Return the locked task, the attempt, and whether an earlier call with the same name already ended the lease.
        Raise `Conflict` if the lease ended in any other way.
        """
        row, attempt = self._lock_attempt(task_id, lease_id, by)
        if attempt.finished_at is None and row.lease_id == attempt.lease_id:
            self._transitions.workers.record_contact(attempt.worker_id)
            return row, attempt, False
        if attempt.ended_by == call:
            return row, attempt, True
        if attempt.ended_by in rows.END_REPORTS:
            raise Conflict(
                f"This lease was already ended by a `{attempt.ended_by}` request.",
                code="task_terminal",
                current_status=row.status,
            )
        raise self._transitions.stale_call_error()

    # -- during a run

    def start(self, task_id: str, lease_id: str | None, by: Principal) -> StartedResponse:
        """Start an assigned task. A repeated call only renews the lease."""
        row, attempt = self.lock_leased_task(task_id, lease_id, by)
        until, now = self._transitions.new_lease_expiry(), clock.now()
        if row.status == "assigned":
            counted = not row.get("resuming")
            used = 0 if counted else row.get("used_ms")
            queue_ms = clock.elapsed_ms(row.queued_at or row.created_at, now)
            transition(
                row,
                "running",
                event=TaskStarted,
                attempt=row.attempt + 1 if counted else row.attempt,
                started_at=now,
                resuming=False,
                used_ms=used,
            )
            rows.change_attempt(
                attempt,
                status="running",
                started_at=now,
                ack_until=None,
                lease_until=until,
                counted=counted,
                n=row.attempt,
                resumed=not counted,
                last_activity_at=now,
                timeout_at=clock.now(row.timeout_seconds - used / 1000),
            )
            statistics.count_started_attempt(queue_ms)
            self._transitions.metrics.observe_queue_time(queue_ms)
        else:
            rows.change_attempt(attempt, lease_until=until)
        self._transitions.workers.record_contact(attempt.worker_id)
        return StartedResponse(status=row.status, attempt=row.attempt, expires_at=until)

    def progress(self, task_id: str, lease_id: str | None, report: ProgressReport, by: Principal) -> LeaseRenewal:
        """Renew the lease and store the progress."""
        row, attempt = self.lock_started_task(task_id, lease_id, by)
        now = clock.now()
        changes: dict[str, Any] = self._usages.apply_report(row, attempt, report.usage)
        if report.percent is not None or report.message is not None:
            changes["progress"] = {"percent": report.percent, "message": report.message, "updated_at": now}
        if changes:
            rows.change_task(row, changes)
        self.renew_lease(attempt, **self._detect_loop(row, attempt, report.signature))
        if row.status == "running" and has_reached_cost_limit(attempt):
            self._outcomes.request_stop(row, kind="budget", reason=None)
        if "progress" in changes and (attempt.progress_event_at or "") <= clock.now(-1):
            rows.change_attempt(attempt, progress_event_at=now)
            publish_task_event(TaskProgressed, row, row.status, progress=changes["progress"])
        self._transitions.workers.record_contact(attempt.worker_id)
        return LeaseRenewal(state=lease_state(row, attempt), expires_at=attempt.lease_until)

    def lock_started_task(self, task_id: str, lease_id: str | None, by: Principal) -> tuple[TaskRow, AttemptRow]:
        """Lock a task whose run has started. Return the task and its live attempt.

        Raise `Conflict` if the lease is not live (code `lease_lost`) or the run has not started.
        """
        row, attempt = self.lock_leased_task(task_id, lease_id, by)
        if row.status == "assigned":
            raise Conflict("The task has not been started; start it first.", current_status=row.status)
        return row, attempt

    def renew_lease(self, attempt: AttemptRow, **changes: Any) -> None:
        """Renew the lease of a run that has shown activity."""
        rows.change_attempt(
            attempt,
            lease_until=self._transitions.new_lease_expiry(),
            last_activity_at=clock.now(),
            stalled=False,
            **changes,
        )

    def _detect_loop(self, row: TaskRow, attempt: AttemptRow, signature: str | None) -> dict[str, Any]:
        """Detect loops by counting consecutive steps that report the same signature.

        When the count reaches the limit, the run is reported as stalled. Return the changed columns of the attempt.
        """
        if signature is None:
            return {}
        count = attempt.signature_count + 1 if signature == attempt.signature else 1
        if count == attempt.loop_repeats and row.status == "running":
            self.report_stall(row, attempt, "loop")
        return {"signature": signature, "signature_count": count}

    def report_stall(self, row: TaskRow, attempt: AttemptRow, kind: str) -> None:
        """Report a run that is idle or in a loop, and stop the run if its stall policy requires it."""
        publish_task_event(
            TaskStalled, row, row.status, kind=kind, idle_ms=clock.elapsed_ms(attempt.last_activity_at, clock.now())
        )
        self._transitions.metrics.count_stall(kind)
        rows.change_attempt(attempt, stalls=attempt.stalls + 1)
        if attempt.stalls == 1:
            cause = tuple(row.get("cause_chain"))
            self._transitions.agents.record_stall(attempt.agent_id, cause=cause)
        if attempt.stall_action != "notify":
            why = "The run repeats the same step." if kind == "loop" else "The run made no progress."
            self._outcomes.request_stop(row, kind="stalled", reason=why)

    def checkpoint(
        self, task_id: str, lease_id: str | None, report: CheckpointReport, by: Principal
    ) -> CheckpointAccepted:
        """Store the checkpoint from which the next attempt resumes, unless the stored one belongs to a later step."""
        row, attempt = self.lock_started_task(task_id, lease_id, by)
        self._store_checkpoint(row, attempt, report)
        self.renew_lease(attempt)
        self._transitions.workers.record_contact(attempt.worker_id)
        return CheckpointAccepted(step=attempt.checkpoint_step or 0)

    def _store_checkpoint(self, row: TaskRow, attempt: AttemptRow, report: CheckpointReport) -> None:
        if attempt.checkpoint_step is not None and report.step < attempt.checkpoint_step:
            return
        text = to_limited_json({"step": report.step, "state": report.state}, STATE_LIMIT + 200, "/state")
        rows.change_attempt(attempt, checkpoint=text, checkpoint_step=report.step)
        if row.get("resume") is not None:  # from now on the checkpoint contains this answer
            rows.change_task(row, {"resume": None})

    # -- the end of a run

    def complete(
        self,
        task_id: str,
        lease_id: str | None,
        report: CompletionReport,
        by: Principal,
        *,
        patch: PreparedPatch | None = None,
    ) -> Encoded:
        """Complete a run with its result. If its diff (`patch`) requires a review, the task waits for the review.

        While the task is being cancelled, the result is stored on the attempt only. However, if a person requested the
        cancellation and the setting `workers.accept_late_results` is on, the result completes the task.

        Raise `Conflict` if the run has not started or its lease was ended in another way, and `Invalid` if the report
        contains memories, unknown files, or a result or diff that is too large.
        """
        if report.memories:
            raise Invalid.at("/memories", "not_allowed", "No plugin stores memories; leave out this field.")
        row, attempt, again = self._lock_for_end_report(task_id, lease_id, by, "complete")
        if not again:
            self._require_started(row, "be completed")
            result = to_limited_json(report.result, RESULT_LIMIT, "/result")
            self._usages.record_usage(row, attempt, report.usage)
            if row.status == "cancelling" and not self._accepts_late_result(row):
                self._outcomes.end_cancelling(row, attempt, by="complete", late_result=result)
            else:
                artifacts = self._artifacts_of(row, report)
                if not self._reviews.begin(row, attempt, result=result, artifacts=artifacts, patch=patch):
                    self._outcomes.complete(row, attempt, result=result, artifacts=artifacts, by="complete")
        return rows.encoded_response(row.id, row.version)

    def _artifacts_of(self, row: TaskRow, report: CompletionReport) -> list[Artifact] | None:
        """Return the artifacts that a run reports, and the other files that the run stored without reporting them.

        Raise `Invalid` with the code `unknown_reference` for a file that belongs neither to the task nor to its
        requester. Return None if there are no artifacts.
        """
        reported = [] if isinstance(report.artifacts, msgspec.UnsetType) else report.artifacts
        named = {item.file_id.lower(): index for index, item in enumerate(reported) if isinstance(item.file_id, str)}
        faults = [
            FieldError(f"/artifacts/{index}/file_id", "unknown_reference", "There is no file with this id.")
            for file_id, index in named.items()
            if not self._has_file(row, file_id)
        ]
        if faults:
            raise Invalid("Some artifacts refer to files that do not exist.", errors=faults, code="unknown_reference")
        stored = [] if self.files is None else self.files.made_for_task(row.id)
        made = [Artifact(name=file.name[:200], file_id=file.id) for file in stored if file.id not in named]
        all_of_them = [*reported, *made][:MAX_ARTIFACTS]
        return None if isinstance(report.artifacts, msgspec.UnsetType) and not made else all_of_them

    def _has_file(self, row: TaskRow, file_id: str) -> bool:
        file = None if self.files is None else self.files.facts(file_id)
        return file is not None and (file.task_id == row.id or file.owner_id == row.created_by)

    def _accepts_late_result(self, row: TaskRow) -> bool:
        return row.cancel_kind == "user" and self._settings.get(declared.ACCEPT_LATE_RESULTS)

    def fail(self, task_id: str, lease_id: str | None, report: FailureReport, by: Principal) -> Encoded:
        """Fail a run. The retry policy decides whether the task is retried.

        If the run has not started, instead return the task to its queue without consuming an attempt. If the task is
        being cancelled, end it as the cancellation requires.
        """
        row, attempt, again = self._lock_for_end_report(task_id, lease_id, by, "fail")
        if not again:
            self._usages.record_usage(row, attempt, report.usage)
            if row.status == "cancelling":
                self._outcomes.end_cancelling(row, attempt, by="fail")
            elif row.status == "assigned":  # the run never started, so no attempt is consumed
                self._outcomes.requeue(row, attempt, attempt_status="released", by="fail")
            else:
                self._outcomes.fail(
                    row,
                    attempt,
                    "error",
                    report.error.type,
                    report.error.message,
                    retryable=report.retryable,
                    by="fail",
                )
        return rows.encoded_response(row.id, row.version)

    def wait(self, task_id: str, lease_id: str | None, report: WaitReport, by: Principal) -> Encoded:
        """End the lease and make the task wait for a person.

        The timeout and the stall detection are paused until the person has answered.

        Raise `Invalid` unless exactly one of `approval`, `approval_id` and `input` is set and valid, and `Conflict` if
        the run has not started or its lease was ended in another way.
        """
        row, attempt, again = self._lock_for_end_report(task_id, lease_id, by, "wait")
        if again:
            return rows.encoded_response(row.id, row.version)
        given = [name for name in ("approval", "approval_id", "input") if getattr(report, name) is not None]
        if not given:
            raise Invalid.at("/input", "required", "One of approval, approval_id and input is required.")
        if len(given) > 1:
            raise Invalid.at(f"/{given[0]}", "not_allowed", "Send only one of approval, approval_id and input.")
        if report.input is not None:
            check_question(report.input)
        self._require_started(row, "wait")
        if report.checkpoint is not None:
            self._store_checkpoint(row, attempt, report.checkpoint)
        if row.status == "cancelling":
            self._outcomes.end_cancelling(row, attempt, by="wait")
        elif report.input is not None:
            wait_for_input(self._transitions, row, attempt, report.input, by="wait")
        else:
            self._wait_for_approval(row, attempt, report, by)
        return rows.encoded_response(row.id, row.version)

    def _wait_for_approval(self, row: TaskRow, attempt: AttemptRow, report: WaitReport, by: Principal) -> None:
        """Make the task wait for the decision on an approval request.

        If the request has already been decided, queue the task immediately instead.
        """
        if self.approvals is None:
            raise Unavailable(
                "Approvals require the `approvals` plugin, which is not active; enable the plugin.",
                code="plugin_disabled",
                retry_after=60,
            )
        if report.approval is not None:
            asked = {"type": "task_step", **report.approval, "task_id": row.id}
            approval = self.approvals.request(convert(NewApproval, asked, pointer_prefix="/approval"), by=by)
        else:
            found = self.approvals.find((report.approval_id or "").lower())
            if found is None or found.task_id != row.id:
                detail = "This task has no approval request with this id."
                raise Invalid.at("/approval_id", "unknown_reference", detail, problem="unknown_reference")
            approval = found
        decided = self.approvals.resume_data(approval.id)
        if decided is None:
            waiting_for = {
                "kind": "approval",
                "id": approval.id,
                "since": clock.now(),
                "expires_at": approval.expires_at,
            }
            begin_wait(self._transitions, row, attempt, waiting_for, by="wait", approval_id=approval.id)
            return
        self._transitions.end_lease(
            row,
            attempt,
            "pending",
            attempt_status="waiting",
            by="wait",
            approval_id=approval.id,
            resume=msgspec.Raw(rows.to_json_text(decided).encode()),
            **_paused_columns(row),
            **requeue_columns(row),
        )

    def release(self, task_id: str, lease_id: str | None, report: ReleaseReport, by: Principal) -> Encoded:
        """Return a task to its queue without consuming an attempt.

        If an open circuit breaker stopped the run, the task becomes available at the earliest time at which the breaker
        can admit a call again.
        """
        row, attempt, again = self._lock_for_end_report(task_id, lease_id, by, "release")
        if not again:
            self._usages.record_usage(row, attempt, report.usage)
            if row.status == "cancelling":
                self._outcomes.end_cancelling(row, attempt, by="release")
            else:
                why, changes = self._error_and_delay_of(report.reason, row, attempt)
                self._outcomes.requeue(row, attempt, attempt_status="released", by="release", why=why, **changes)
        return rows.encoded_response(row.id, row.version)

    def _error_and_delay_of(
        self, reason: str, row: TaskRow, attempt: AttemptRow
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the error of an attempt that a budget or breaker ended, and the columns that delay the next claim."""
        agent = self._transitions.agents.find(attempt.agent_id)
        message, columns = "", {}
        if reason == BUDGET_EXCEEDED:
            shortage = None if agent is None else find_refused_call(row, agent, self._models.model_name(agent))
            message = "A budget did not allow a call." if shortage is None else shortage.describe()
            columns = requeue_columns(row, delay_seconds=BUDGET_DELAY_SECONDS)
        elif reason == CIRCUIT_OPEN:
            blocked = None if agent is None else self._models.blocked_model(agent)
            message = "A circuit breaker rejected a call."
            if blocked is not None:
                message = self._models.describe_block(blocked).detail
                columns = requeue_columns(row, available_at=blocked.blocked_until)
        if not message:
            return None, {}
        return task_error("error", reason, message, retryable=True, attempt=row.attempt), columns

    def confirm_cancellation(
        self, task_id: str, lease_id: str | None, report: CancellationReport, by: Principal
    ) -> Encoded:
        """Confirm that the run of a task whose status is `cancelling` has ended.

        Raise `Conflict` if the task has another status, or if its lease was ended in another way.
        """
        row, attempt, again = self._lock_for_end_report(task_id, lease_id, by, "cancelled")
        if not again:
            if row.status != "cancelling":
                raise Conflict(
                    "No cancellation of this task was requested; release the task instead.", current_status=row.status
                )
            self._usages.record_usage(row, attempt, report.usage)
            self._outcomes.end_cancelling(row, attempt, by="cancelled")
        return rows.encoded_response(row.id, row.version)

    @staticmethod
    def _require_started(row: TaskRow, what: str) -> None:
        if row.status == "assigned":
            raise Conflict(f"A task must be started before it can {what}.", current_status=row.status)

    def record_stale_usage(self, task_id: str, lease_id: str | None, used: UsageReport, by: Principal) -> None:
        """Record the usage that a worker reports after it has lost the lease, because the money has already been spent.

        All other effects of such a call are discarded.
        """
        try:
            row, attempt = self._lock_attempt(task_id, lease_id, by)
        except (Conflict, NotFound, Forbidden):
            return
        self._usages.record_usage(row, attempt, used)

    # -- calls of other plugins

    def lock_run(self, task_id: str, lease_id: str | None, *, by: Principal) -> Run:
        """Lock the task and renew the lease of its run. Implements `Tasks.lock_run`."""
        row, attempt = self.lock_started_task(task_id, lease_id, by)
        self.renew_lease(attempt)
        self._transitions.workers.record_contact(attempt.worker_id)
        return _run_of_rows(row, attempt)

    def record_shortage(self, task_id: str, lease_id: str, *, scope: str, needed_micro: int, left_micro: int) -> None:
        """Record that a model call by the run was refused because of a budget. Implements `Tasks.record_shortage`."""
        found = self._lock_live_lease(task_id, lease_id)
        agent = None if found is None else self._transitions.agents.find(found[1].agent_id)
        if found is not None and agent is not None:
            shortage, model = RefusedCall(scope, needed_micro, left_micro), self._models.model_name(agent)
            rows.change_task(found[0], {"budget_shortages": with_refused_call(found[0], agent, model, shortage)})

    def lock_held_run(self, task_id: str, lease_id: str, approval_id: str) -> Run:
        """Lock a task whose tool call is waiting for an approval. Implements `Tasks.lock_held_run`."""
        row = rows.lock_task(task_id)
        if not is_held_for(row, lease_id, approval_id):
            raise rows.lease_lost_error()
        return _run_of_rows(row, rows.find_live_attempt(task_id) if row.lease_id is not None else None)

    def find_run(self, task_id: str) -> Run | None:
        """Return the run of a task without locking the task. Implements `Tasks.find_run`."""
        row = rows.find_task(task_id)
        if row is None:
            return None
        return _run_of_rows(row, rows.find_live_attempt(task_id) if row.lease_id is not None else None)

    def taint(self, task_id: str, lease_id: str, sources: Sequence[str]) -> bool:
        """Mark a task and its attempt as tainted. Implements `Tasks.taint_run`."""
        try:
            row = rows.lock_task(task_id)
        except NotFound:
            return False
        all_sources = rows.taint_task(row, sources)
        attempt = rows.find_attempt(lease_id)
        if attempt is None:
            return False
        found = _TAINTED.one({"id": attempt.id})
        rows.change_attempt(attempt, tainted=True, taint_sources=all_sources)
        return found is not None and not found[0]

    def fail_run(self, task_id: str, lease_id: str, *, type: str, message: str) -> None:
        """Fail the attempt that has this lease. Implements `Tasks.fail_run`."""
        found = self._lock_live_lease(task_id, lease_id)
        if found is None:
            return
        row, attempt = found
        if row.status == "cancelling":
            self._outcomes.end_cancelling(row, attempt, by="tools")
        else:
            self._outcomes.fail(row, attempt, "error", type, message, by="tools")
        self._transitions.send_signal(attempt, "lost")

    def stop(self, task_id: str, lease_id: str, *, kind: str, reason: str | None) -> bool:
        """Ask the worker to stop the run of a lease. Implements `Tasks.stop_run`."""
        found = self._lock_live_lease(task_id, lease_id)
        if found is None or found[0].status not in ("assigned", "running"):
            return False
        self._outcomes.request_stop(found[0], kind=kind, reason=reason)
        return True

    def ask_person(self, task_id: str, lease_id: str, asked: AskedInput, *, call_id: str) -> None:
        """Suspend a run until a person answers a question. The answer becomes the result of the tool call `call_id`.

        Raise `Invalid` if the schema of the answer is not acceptable, and `Conflict` (`lease_lost`) unless the lease is
        live and the task is running.
        """
        check_question(asked)
        found = self._lock_live_lease(task_id, lease_id)
        if found is None or found[0].status != "running":
            raise Conflict("Only a running task can wait for an answer.", code="lease_lost")
        row, attempt = found
        wait_for_input(self._transitions, row, attempt, asked, by=rows.ASK_TOOL, call_id=call_id)

    @staticmethod
    def _lock_live_lease(task_id: str, lease_id: str) -> tuple[TaskRow, AttemptRow] | None:
        try:
            row = rows.lock_task(task_id)
        except NotFound:
            return None
        attempt = rows.find_attempt(lease_id)
        return None if attempt is None or row.lease_id != lease_id else (row, attempt)

    # -- secrets

    def deliver_secret(
        self, task_id: str, lease_id: str | None, name: str, purpose: str | None, by: Principal
    ) -> SecretDelivery:
        """Return the value of a secret to the worker that holds the lease.

        Raise `NotFound` unless the secret is available to the worker's group.
        """
        if by.kind != "worker" or by.worker_id is None:
            raise Forbidden("Only workers may read secrets, and only with their own token.")
        self.lock_leased_task(task_id, lease_id, by)
        worker = self._transitions.workers.find(by.worker_id)
        if self.secrets is None or worker is None or worker.group is None:
            raise NotFound("No secret with this name is available to this worker.")
        return self.secrets.deliver_to_worker(name, worker.group, worker_id=worker.id, task_id=task_id, purpose=purpose)


def lease_state(row: TaskRow, attempt: AttemptRow) -> str:
    """Return the state of the lease for the response to a progress report."""
    if row.status == "cancelling":
        return "cancel_requested"
    warning = attempt.cost_warning_micro
    return "budget_warning" if warning is not None and attempt.cost_micro >= warning else "ok"


def to_limited_json(value: Any, limit: int, pointer: str) -> str:
    """Return the value as JSON text. Raise `Invalid` with the code `too_long` if the text exceeds `limit` bytes."""
    data = msgspec.json.encode(value)
    if len(data) > limit:
        detail = f"at most {limit // 1024} KiB of JSON"
        raise Invalid(f"{pointer} is too large: {detail}.", errors=[FieldError(pointer, "too_long", detail)])
    return data.decode()


def check_question(asked: AskedInput) -> None:
    """Raise `Invalid` if a question contains an unacceptable JSON Schema."""
    if asked.schema is not None:
        check_user_schema(asked.schema, pointer_prefix="/input/schema")


def wait_for_input(
    transitions: TaskTransitions,
    row: TaskRow,
    attempt: AttemptRow,
    asked: AskedInput,
    *,
    by: str,
    call_id: str | None = None,
) -> None:
    """Set a running task to the status `waiting` until a person answers.

    If a tool call asked the question, `call_id` is the id of that call, and the answer becomes the result of the call.
    """
    now = clock.now()
    until = clock.now(asked.expires_in_seconds) if asked.expires_in_seconds is not None else None
    waiting_for: dict[str, Any] = {
        "kind": "input",
        "id": new_id(),
        "since": now,
        "prompt": asked.prompt,
        "schema": asked.schema,
        "expires_at": until,
    }
    if call_id is not None:
        waiting_for["call_id"] = call_id
    begin_wait(transitions, row, attempt, waiting_for, by=by, waiting_until=until)


def begin_wait(
    transitions: TaskTransitions,
    row: TaskRow,
    attempt: AttemptRow,
    waiting_for: dict[str, Any],
    *,
    by: str,
    **changes: Any,
) -> None:
    """Set a running task to the status `waiting`, and end its lease. Its timeout and stall detection are paused."""
    transitions.end_lease(
        row,
        attempt,
        "waiting",
        attempt_status="waiting",
        by=by,
        event=TaskWaiting,
        fields={"waiting_for": waiting_for},
        waiting_for=waiting_for,
        waiting_kind=waiting_for["kind"],
        **_paused_columns(row),
        **changes,
    )


def _paused_columns(row: TaskRow) -> dict[str, Any]:
    """Return the columns to set when a run pauses.

    The next claim continues the same attempt with the remaining time.
    """
    now = clock.now()
    used = row.get("used_ms") + clock.elapsed_ms(row.started_at or now, now)
    return {"resuming": True, "used_ms": used, **NOT_CANCELLED}


def is_held_for(row: TaskRow, lease_id: str, approval_id: str) -> bool:
    """Return whether a task is waiting for the approval, or is still running under the lease `lease_id`."""
    if row.status == "waiting":
        return bool(row.waiting_kind == "approval" and row.get("waiting_for").get("id") == approval_id)
    return row.status == "running" and row.lease_id == lease_id


def _run_of_rows(row: TaskRow, attempt: AttemptRow | None) -> Run:
    return Run(
        task_id=row.id,
        lease_id=attempt.lease_id if attempt else "",
        fence=row.fence,
        agent_id=attempt.agent_id if attempt else row.agent_id or "",
        worker_id=attempt.worker_id if attempt else "",
        requester_id=row.created_by,
        allowed_tools=row.get("allowed_tools"),
        tainted=row.get("tainted"),
        taint_sources=row.get("taint_sources") or [],
        cause_chain=tuple(row.get("cause_chain")),
    )
