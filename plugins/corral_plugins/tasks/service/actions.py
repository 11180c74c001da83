"""What people do to tasks: cancel, retry, answer, end, delete, comment."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.errors import Conflict, Fault, Forbidden, Invalid
from corral.http.answers import ANY_VERSION, Encoded, IfMatch
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Audit, AuditEntry
from corral.schema.data import json_schema_problems
from corral_plugins.tasks.events import TaskDeleted, TaskRetried, TaskUpdated
from corral_plugins.tasks.models import TERMINAL, Comment, Dependency, Task
from corral_plugins.tasks.reports import ReportedError
from corral_plugins.tasks.service import marks, rows, search, tallies, views
from corral_plugins.tasks.service.leases import RESULT_LIMIT, as_json
from corral_plugins.tasks.service.moves import NOT_CANCELLED, Moves, move, tell
from corral_plugins.tasks.service.outcomes import NOT_WAITING, Outcomes
from corral_plugins.tasks.service.relatives import Relatives
from corral_plugins.tasks.service.rows import Row
from corral_plugins.tasks.shapes import CommentView, NewComment
from corral_plugins.tools.api import Tools


class Actions:
    """Joins the caller's unit; every change answers the task as it is then."""

    audit: Audit | None
    tools: Tools | None

    def __init__(self, moves: Moves, outcomes: Outcomes, relatives: Relatives) -> None:
        self._moves, self._outcomes, self._relatives = moves, outcomes, relatives

    def _owned(self, task_id: str, match: IfMatch, by: Principal) -> Row:
        row = rows.lock(task_id)
        require_owner(by, row.created_by, what="task", manage="tasks.manage")
        match.check(row.version)
        return row

    def cancel(self, task_id: str, match: IfMatch = ANY_VERSION, *, by: Principal, reason: str | None) -> Encoded:
        """`cancelled` at once (200), or `cancelling` until the worker has ended it (202). Again: the same answer."""
        row = self._owned(task_id, match, by)
        if row.status in ("completed", "failed"):
            raise terminal(row)
        if row.status != "cancelled":
            self._outcomes.cancel(row, kind="user", reason=reason)
        return views.answer(row.id, row.version, status=202 if row.status == "cancelling" else 200)

    def retry(
        self,
        task_id: str,
        match: IfMatch = ANY_VERSION,
        *,
        by: Principal,
        from_checkpoint: bool,
        reason: str | None,
        source: str = "person",
    ) -> Encoded:
        """A failed or cancelled task begins anew under its id; the attempts before stay in the ledger."""
        row = self._owned(task_id, match, by)
        if row.status == "completed":
            raise terminal(row)
        if row.status not in ("failed", "cancelled"):
            raise Conflict(
                f"The task is {row.status}; only failed and cancelled ones are tried again.", current_status=row.status
            )
        state = self._needs(row)
        if state == "dead":
            told = "A task that this one needs did not complete: retry that one first, or create this one anew."
            raise Conflict(told, current_status=row.status)
        columns = self._moves.queued(row) if state == "pending" else {"queue": None, "available_at": clock.now()}
        if row.deadline is not None and row.deadline <= clock.now():
            columns.update(deadline=None, deadline_key="9999-12-31T23:59:59.999Z")
        move(
            row,
            state,
            event=TaskRetried,
            named={"source": source, "reason": reason, "available_at": columns["available_at"]},
            attempt=0,
            lost_in_row=0,
            resuming=False,
            used_ms=0,
            reopened_count=row.reopened_count + 1,
            error=None,
            result=None,
            finished_at=None,
            failed_dependency_id=None,
            progress=None,
            checkpoint_floor=row.checkpoint_floor if from_checkpoint else row.fence,
            **({} if from_checkpoint else {"resume": None}),
            **NOT_CANCELLED,
            **columns,
        )
        self._relatives.reblock(row.id)
        return views.answer(row.id, row.version)

    @staticmethod
    def _needs(row: Row) -> str:
        """`pending`, `blocked`, or `dead` when something it needs will not complete."""
        needed = (
            Dependency.select(Task.status)
            .join(Task, on=(Task.id == Dependency.needs_id))
            .where(Dependency.task_id == row.id)
        )
        states = {status for (status,) in rows.values(needed)}
        is_gone = row.failed_dependency_id is not None and rows.find(row.failed_dependency_id) is None
        if is_gone or states & {"failed", "cancelled"}:
            return "dead"
        return "blocked" if states - {"completed"} else "pending"

    def give_input(self, task_id: str, value: Any, *, by: Principal) -> Encoded:
        """Answer what the task waits for; it goes on with the next claim."""
        row = self._owned(task_id, ANY_VERSION, by)
        if row.status != "waiting" or row.waiting_kind != "input":
            raise Conflict("The task does not wait for input.", current_status=row.status)
        asked = rows.parsed(row.waiting_for)
        _must_fit(asked.get("schema"), value, "/input", "the asked schema")
        self._resume_with(row, asked.get("call_id"), as_json({"input": value}, RESULT_LIMIT, "/input"), value)
        return views.answer(row.id, row.version)

    def expire_input(self, row: Row) -> None:
        """Nobody answered in time; the task goes on without."""
        call_id = rows.parsed(row.waiting_for).get("call_id")
        error = {"type": "expired", "message": "Nobody answered in time."}
        self._resume_with(row, call_id, '{"input":null,"input_expired":true}', None, error)

    def _resume_with(
        self, row: Row, call_id: str | None, given: str, value: Any, error: dict[str, str] | None = None
    ) -> None:
        """`given` (JSON) for a run that waits; for one whose tool asked, the result of that call."""
        if call_id is not None:
            if self.tools is not None:
                self.tools.answered(row.id, call_id, result=value, error=error)
            status = "succeeded" if error is None else "failed"
            result = {"call_id": call_id, "status": status, "result": value, "error": error}
            given = as_json({"tool_results": [result]}, RESULT_LIMIT + 1024, "/input")
        self.resume(row, given)

    def resume(self, row: Row, given: str) -> None:
        """A waiting task goes back to the queue with what it waited for (a JSON object)."""
        move(row, "pending", event=TaskUpdated, resume=given, resuming=True, **NOT_WAITING, **self._moves.queued(row))

    def complete(self, task_id: str, result: Any, *, by: Principal) -> Encoded:
        """The owner says that the task is done; a result that does not fit `output_schema` is refused."""
        row = self._ended_by_owner(task_id, by)
        _must_fit(rows.parsed(row.output_schema), result, "/result", "output_schema")
        attempt = rows.live(row.id)
        text = as_json(result, RESULT_LIMIT, "/result")
        self._outcomes.complete(row, None if attempt is None else attempt, result=text, artifacts=None, by="owner")
        return self._told(row, attempt, "tasks.task.complete")

    def fail(self, task_id: str, error: ReportedError, *, by: Principal) -> Encoded:
        """The owner says that the task has failed."""
        row = self._ended_by_owner(task_id, by)
        attempt = rows.live(row.id)
        self._outcomes.fail_final(row, attempt, "error", error.type, error.message, by="owner")
        return self._told(row, attempt, "tasks.task.fail")

    def _ended_by_owner(self, task_id: str, by: Principal) -> Row:
        row = self._owned(task_id, ANY_VERSION, by)
        if row.status in TERMINAL:
            raise terminal(row)
        return row

    def _told(self, row: Row, attempt: rows.Ledger | None, action: str) -> Encoded:
        if attempt is not None:
            self._moves.signal(attempt, "lost")
        if self.audit is not None:
            self.audit.record(AuditEntry(action=action, object_type="task", object_id=row.id))
        return views.answer(row.id, row.version)

    def delete(self, task_id: str, match: IfMatch = ANY_VERSION, *, by: Principal) -> None:
        """Remove an ended task; a job removes what hangs on it."""
        row = self._owned(task_id, match, by)
        if row.status not in TERMINAL:
            raise Conflict(f"The task is {row.status}; cancel it first.", current_status=row.status)
        remove(row)
        tell(TaskDeleted, row, row.status)

    # -- comments

    def comment(self, task_id: str, new: NewComment, *, by: Principal) -> CommentView:
        """Add a remark."""
        row = rows.find(task_id)
        if row is None:
            rows.lock(task_id)
        assert row is not None
        if by.kind == "worker" and not rows.is_held_by(row, by.worker_id):
            raise Forbidden("Only the worker that holds the task may comment on it.")
        if not new.body.strip():
            raise Invalid(
                "A comment has at least 1 character.", errors=[Fault("/body", "too_short", "at least 1 character")]
            )
        comment_id, now = new_id(), clock.now()
        Comment.insert(
            id=comment_id,
            task_id=task_id,
            author_type=by.kind,
            author_id=by.id,
            created_by=by.user_id,
            body=new.body,
            created_at=now,
        ).execute()
        tell(TaskUpdated, row, row.status)
        return CommentView(id=comment_id, author={"type": by.kind, "id": by.id}, body=new.body, created_at=now)


def remove(row: Row) -> None:
    """Delete the row of an ended task; its ledger, logs and comments follow by a job."""
    search.forget(row)
    if row.status != "completed":  # what needs it cannot be tried again
        dependents = Dependency.select(Dependency.task_id).where(Dependency.needs_id == row.id)
        ended = Task.finished_at.is_null(False) & Task.failed_dependency_id.is_null()
        Task.update(failed_dependency_id=row.id).where(Task.id.in_(dependents) & ended).execute()
    Task.delete().where((Task.id == row.id) & (Task.status == row.status)).execute()
    # What others need of it stays until they go: a job may still have to tell them how it ended.
    Dependency.delete().where(Dependency.task_id == row.id).execute()
    tallies.moved(row.status, None, row.priority, row.created_by)
    marks.removed(row.created_at, row.id)
    enqueue("tasks.purge", task_id=row.id)


def _must_fit(schema: Any, value: Any, pointer: str, what: str) -> None:
    """`schema_mismatch` unless the value fits the schema, if there is one."""
    faults = json_schema_problems(schema, value, pointer_prefix=pointer) if schema is not None else ()
    if faults:
        raise Invalid(f"{len(faults)} places do not fit {what}.", code="schema_mismatch", errors=faults)


def terminal(row: Row) -> Conflict:
    """The task has ended."""
    return Conflict(f"The task is {row.status}.", code="task_terminal", current_status=row.status)
