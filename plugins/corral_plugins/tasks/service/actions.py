"""The actions of a task's owner: change, cancel, retry, answer, complete, fail, delete and comment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.errors import Conflict, FieldError, Forbidden, Invalid
from corral.http.answers import ANY_VERSION, Encoded, IfMatch
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.cost.api import Costs
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import TaskOverrides, TaskRetried, TaskUpdated
from corral_plugins.tasks.models import (
    NO_DEADLINE,
    PRIORITIES,
    TERMINAL,
    AttemptRow,
    Comment,
    Dependency,
    Task,
    TaskRow,
)
from corral_plugins.tasks.service import outcomes, queries, retention, rows, statistics, tags
from corral_plugins.tasks.service.creation import (
    add_dependencies,
    agent_warnings,
    check_limits,
    check_reviewer,
    checked_title,
    find_named_agent,
    future_instant,
    given_members,
    has_open_dependency,
    instant_to_text,
)
from corral_plugins.tasks.service.dead_letters import TaskDeadLetters
from corral_plugins.tasks.service.outcomes import TaskOutcomes
from corral_plugins.tasks.service.runs import RESULT_LIMIT, to_limited_json
from corral_plugins.tasks.service.transitions import (
    NOT_CANCELLED,
    NOT_QUEUED,
    TaskTransitions,
    add_seconds,
    aged_rank,
    publish_task_event,
    queue_columns,
    queue_key,
    requeue_columns,
    requeue_waiting,
    transition,
)
from corral_plugins.tasks.shapes import CommentView, NewComment, TaskPatch
from corral_plugins.tasks.worker_protocol_shapes import ReportedError
from corral_plugins.tools.api import Tools

ALWAYS = frozenset({"tags", "metadata"})
QUEUEING = frozenset({"priority", "agent_id", "agent_role", "required_tools", "available_at", "queue_timeout_seconds"})
"""The fields that determine a task's queue, its position in the queue, and its queue timeout."""
WHILE_LEASED = ALWAYS | {"title", "description", "deadline", "priority"}


class OwnerActions:
    """The actions that people perform on tasks. Every method runs in the caller's unit of work.

    A method that changes a task returns the changed task.
    """

    audit: Audit | None
    code_reviews: CodeReviews | None
    cost: Costs | None
    tools: Tools | None

    def __init__(self, transitions: TaskTransitions, outcomes: TaskOutcomes, dead_letters: TaskDeadLetters) -> None:
        self._transitions, self._outcomes, self._dead_letters = transitions, outcomes, dead_letters
        self._settings, self._agents = transitions.settings, transitions.agents

    def _lock_owned_task(self, task_id: str, match: IfMatch, by: Principal) -> TaskRow:
        row = rows.lock_task(task_id)
        require_owner(by, row.created_by, what="task", manage="tasks.manage")
        match.check(row.version)
        return row

    # -- patch

    def patch(self, task_id: str, patch: TaskPatch, match: IfMatch, *, by: Principal) -> Encoded:
        """Change fields of a task. The status of the task determines which fields can be changed.

        An empty body changes nothing. Raise `Invalid` (`use_action`) if the patch sets the status, and `Conflict` if
        the status of the task does not allow a change to one of the fields.
        """
        if patch.status is not UNSET:
            raise Invalid.at(
                "/status",
                "not_allowed",
                "The status cannot be set directly; use the actions cancel, retry, complete and fail.",
                problem="use_action",
            )
        row = self._lock_owned_task(task_id, match, by)
        given = {name: getattr(patch, name) for name in patch.__struct_fields__}
        given = {name: value for name, value in given.items() if value is not UNSET}
        if not given:
            return rows.encoded_response(row.id, row.version)
        _check_changeable(row, given)
        warnings = self._apply_patch(row, given)
        return rows.encoded_response(row.id, row.version, warnings=warnings)

    def _apply_patch(self, row: TaskRow, given: dict[str, Any]) -> list[str]:
        reviews = self.code_reviews is not None
        check_limits(given, enforces_budgets=self.cost is not None, performs_reviews=reviews)
        check_reviewer(self._agents, given.get("review_policy"), given.get("agent_id", row.agent_id))
        changes = {name: _CONVERTED[name](value) if name in _CONVERTED else value for name, value in given.items()}
        if "deadline" in changes:
            changes["deadline_key"] = changes.pop("deadline") or NO_DEADLINE
        if given.keys() & {"description", "input", "instructions"}:
            changes["budget_shortages"] = {}  # another conversation may need less
        warnings = self._add_queue_columns(row, changes)
        if changes.keys() & {"retry_policy", "agent_id"}:
            changes["max_attempts"] = self._max_attempts(row, changes)
        to = self._set_dependencies(row, changes) if "depends_on" in given else row.status
        before = row.priority
        row.priority = changes.get("priority", before)
        if row.priority != before:
            statistics.count_priority_change(row.status, before, row.priority)
        if "tags" in given:
            tags.remove_tags(row.id)
            tags.add_tags(row.id, row.created_at, changes["tags"])
        indexed = queries.indexed_text(row) if given.keys() & {"title", "description"} else None
        if to != row.status:
            transition(row, to, **changes)
        else:
            rows.change_task(row, changes)
            publish_task_event(TaskUpdated, row, row.status)
        queries.reindex(indexed, row)
        return warnings

    def _max_attempts(self, row: TaskRow, changes: Mapping[str, Any]) -> int:
        """Return the maximum number of attempts that a task will have after a change."""
        agent_id = changes.get("agent_id", row.agent_id)
        agent = None if agent_id is None else self._agents.find(agent_id)
        own = given_members(changes["retry_policy"]) if "retry_policy" in changes else row.get("retry_policy")
        return declared.max_attempts(self._settings, agent, own)

    def _add_queue_columns(self, row: TaskRow, changes: dict[str, Any]) -> list[str]:
        """Compute the new queue columns of a changed task, and add them to `changes`.

        Return warnings about the task's agent.
        """
        warnings: list[str] = []
        if changes.keys() & {"agent_id", "agent_role", "required_tools"}:
            if changes.get("agent_id") is not None:
                changes.setdefault("agent_role", None)
            elif changes.get("agent_role") is not None:
                changes.setdefault("agent_id", None)
            agent_id, role = changes.get("agent_id", row.agent_id), changes.get("agent_role", row.agent_role)
            agent = find_named_agent(self._agents, agent_id, role)
            tools = changes.get("required_tools", rows.parse_json_text(row.required_tools))
            changes["queue_key"] = row.queue_key = queue_key(agent_id, role, tools)
            warnings = [] if agent is None else agent_warnings(agent, tools)
        if row.status == "pending" and changes.keys() & QUEUEING:
            changes.update(self._changed_queue_columns(row, changes))
        return warnings

    def _changed_queue_columns(self, row: TaskRow, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the queue columns of a pending task after a change.

        The task keeps its accumulated waiting time, unless the change postpones the task.
        """
        available_at = changes.get("available_at", row.available_at)
        if row.queue is None or row.queued_at is None or available_at > clock.now():
            return _pending_columns(row, changes, available_at)
        priority = changes.get("priority", row.priority)
        seconds = changes.get("queue_timeout_seconds", row.get("queue_timeout_seconds"))
        return {
            "queue": row.queue if row.queue == "held" else row.queue_key,
            "queue_until": add_seconds(row.queued_at, seconds) if seconds else None,
            "rank": aged_rank(self._settings, priority=priority, queued_at=row.queued_at),
        }

    def _set_dependencies(self, row: TaskRow, changes: dict[str, Any]) -> str:
        """Replace the dependencies of a task and return its new status.

        The new values of the queue columns are added to `changes`.
        """
        wanted = changes["depends_on"]
        if row.id in wanted:
            raise Invalid.at("/depends_on", "cycle", "A task cannot depend on itself.", problem="cycle")
        is_open = has_open_dependency(wanted)
        if _depends_on(wanted, row.id):
            raise Invalid.at("/depends_on", "cycle", "One of these tasks depends on this task.", problem="cycle")
        Dependency.delete().where(Dependency.task_id == row.id).execute()
        add_dependencies(row.id, wanted)
        if is_open:
            changes.update(NOT_QUEUED, queued_at=None)
            return "blocked"
        if row.status == "blocked":
            available_at = max(changes.get("available_at", row.available_at), clock.now())
            changes.update(_pending_columns(row, changes, available_at))
        return "pending"

    # -- actions

    def cancel(self, task_id: str, match: IfMatch = ANY_VERSION, *, by: Principal, reason: str | None) -> Encoded:
        """Cancel a task. A repeated call returns the same response.

        The response status is 200 if the task has ended, or 202 if its worker still has to stop the run.
        """
        row = self._lock_owned_task(task_id, match, by)
        if row.status in ("completed", "failed"):
            raise task_ended_error(row)
        if row.status != "cancelled":
            self._outcomes.cancel(row, kind="user", reason=reason)
        return rows.encoded_response(row.id, row.version, status=202 if row.status == "cancelling" else 200)

    def retry(
        self,
        task_id: str,
        match: IfMatch = ANY_VERSION,
        *,
        by: Principal,
        from_checkpoint: bool,
        reason: str | None,
        source: str = "person",
        overrides: TaskOverrides | None = None,
    ) -> Encoded:
        """Retry a failed or cancelled task under the same id. Its earlier attempts are kept.

        `overrides` changes fields of the task before its next attempt.
        """
        row = self._lock_owned_task(task_id, match, by)
        state = _state_after_retry(row)
        self._dead_letters.close(row, by=by.user_id, is_retry=True)
        columns = requeue_columns(row) if state == "pending" else {"queue": None, "available_at": clock.now()}
        if row.deadline is not None and row.deadline <= clock.now():
            columns["deadline_key"] = NO_DEADLINE
        transition(
            row,
            state,
            event=TaskRetried,
            fields={"source": source, "reason": reason, "available_at": columns["available_at"]},
            attempt=0,
            lost_in_row=0,
            resuming=False,
            used_ms=0,
            reopened_count=row.get("reopened_count") + 1,
            error=None,
            result=None,
            finished_at=None,
            failed_dependency_id=None,
            dead_letter_id=None,
            progress=None,
            checkpoint_floor=row.get("checkpoint_floor") if from_checkpoint else row.fence,
            **({} if from_checkpoint else {"resume": None}),
            **NOT_CANCELLED,
            **columns,
        )
        given = {} if overrides is None else msgspec.structs.asdict(overrides)
        if given := {name: value for name, value in given.items() if value is not UNSET}:
            self._apply_patch(row, given)
        outcomes.reblock_dependents(row.id)
        return rows.encoded_response(row.id, row.version)

    def give_input(self, task_id: str, value: Any, *, by: Principal) -> Encoded:
        """Answer the question of a waiting task. The next claim of the task includes the answer.

        Raise `Conflict` if the task is not waiting for an answer, and `Invalid` if the answer does not match the schema
        of the question.
        """
        row = self._lock_owned_task(task_id, ANY_VERSION, by)
        if row.status != "waiting" or row.waiting_kind != "input":
            raise Conflict("The task is not waiting for input.", current_status=row.status)
        asked = row.get("waiting_for")
        _check_schema(asked.get("schema"), value, "/input", "the schema of the question")
        self._resume_with_answer(
            row, asked.get("call_id"), to_limited_json({"input": value}, RESULT_LIMIT, "/input"), value
        )
        return rows.encoded_response(row.id, row.version)

    def expire_input(self, row: TaskRow) -> None:
        """Queue a task whose question was not answered in time."""
        call_id = row.get("waiting_for").get("call_id")
        error = {"type": "expired", "message": "Nobody answered the question in time."}
        self._resume_with_answer(row, call_id, '{"input":null,"input_expired":true}', None, error)

    def _resume_with_answer(
        self, row: TaskRow, call_id: str | None, given: str, value: Any, error: dict[str, str] | None = None
    ) -> None:
        """Queue a waiting task together with an answer. `given` is JSON text that contains the answer.

        If a tool call asked the question, the answer becomes the result of that call.
        """
        if call_id is not None:
            if self.tools is not None:
                self.tools.deliver_result(row.id, call_id, result=value, error=error)
            status = "succeeded" if error is None else "failed"
            result = {"call_id": call_id, "status": status, "result": value, "error": error}
            given = to_limited_json({"tool_results": [result]}, RESULT_LIMIT + 1024, "/input")
        requeue_waiting(row, given)

    def complete(self, task_id: str, result: Any, *, by: Principal) -> Encoded:
        """Complete a task at the request of its owner.

        Raise `Invalid` if the result does not match `output_schema`.
        """
        row = self._lock_unfinished_task(task_id, by)
        attempt = rows.find_live_attempt(row.id)
        _check_schema(rows.output_schema(row, attempt), result, "/result", "output_schema")
        text = to_limited_json(result, RESULT_LIMIT, "/result")
        self._outcomes.complete(row, attempt, result=text, artifacts=None, by="owner")
        return self._signal_and_audit_end(row, attempt, "tasks.task.complete")

    def fail(self, task_id: str, error: ReportedError, *, by: Principal) -> Encoded:
        """Fail a task at the request of its owner."""
        row = self._lock_unfinished_task(task_id, by)
        attempt = rows.find_live_attempt(row.id)
        self._outcomes.fail_permanently(row, attempt, "error", error.type, error.message, by="owner")
        return self._signal_and_audit_end(row, attempt, "tasks.task.fail")

    def give_up(self, task_id: str, *, by: Principal, message: str) -> str:
        """Fail a task that is not leased to a worker, and add its dead letter. Implements `Tasks.give_up`."""
        row = self._lock_owned_task(task_id, ANY_VERSION, by)
        if row.status in ("completed", "cancelled"):
            raise task_ended_error(row)
        if row.status in ("assigned", "running", "cancelling"):
            raise Conflict(f"The task is {row.status}; cancel it first.", current_status=row.status)
        if row.status == "failed":
            return self._dead_letters.add_to_failed(row, reason="manual") or ""
        self._outcomes.fail_permanently(row, None, "error", "manual", message, by="owner")
        return str(row.get("dead_letter_id"))

    def _lock_unfinished_task(self, task_id: str, by: Principal) -> TaskRow:
        row = self._lock_owned_task(task_id, ANY_VERSION, by)
        if row.status in TERMINAL:
            raise task_ended_error(row)
        return row

    def _signal_and_audit_end(self, row: TaskRow, attempt: AttemptRow | None, action: str) -> Encoded:
        if attempt is not None:
            self._transitions.send_signal(attempt, "lost")
        if self.audit is not None:
            self.audit.record(AuditEntry(action=action, object_type="task", object_id=row.id))
        return rows.encoded_response(row.id, row.version)

    def delete(self, task_id: str, match: IfMatch = ANY_VERSION, *, by: Principal) -> None:
        """Delete a task that has ended. A background job deletes its attempts, logs and comments.

        Raise `Conflict` if the task has not ended.
        """
        row = self._lock_owned_task(task_id, match, by)
        if row.status not in TERMINAL:
            raise Conflict(f"The task is {row.status}; cancel it first.", current_status=row.status)
        self._dead_letters.close(row, by=by.user_id, is_retry=False)
        retention.delete_task(row)

    # -- comments

    def add_comment(self, task_id: str, new: NewComment, *, by: Principal) -> CommentView:
        """Add a comment to a task.

        Raise `Forbidden` if the caller is a worker that does not hold the lease, and `Invalid` if the comment is empty.
        """
        row = rows.lock_task(task_id)  # locked, because the event must not tell an older state than the one before it
        if by.kind == "worker" and not rows.is_held_by(row, by.worker_id):
            raise Forbidden("A worker may comment only on a task for which it holds the lease.")
        if not new.body.strip():
            raise Invalid(
                "The comment must not be empty.",
                errors=[FieldError("/body", "too_short", "at least 1 character")],
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
        publish_task_event(TaskUpdated, row, row.status)
        return CommentView(id=comment_id, author={"type": by.kind, "id": by.id}, body=new.body, created_at=now)


def _pending_columns(row: TaskRow, changes: Mapping[str, Any], available_at: str) -> dict[str, Any]:
    """Return the queue columns of a task that becomes pending with the given changes."""
    return queue_columns(
        key=row.queue_key,
        priority=changes.get("priority", row.priority),
        available_at=available_at,
        queue_timeout=changes.get("queue_timeout_seconds", row.get("queue_timeout_seconds")),
        now=clock.now(),
    )


_CONVERTED: dict[str, Callable[[Any], Any]] = {
    "title": checked_title,
    "priority": PRIORITIES.index,
    "agent_id": lambda agent_id: agent_id and agent_id.lower(),
    "deadline": lambda moment: future_instant(moment, "/deadline"),
    "available_at": instant_to_text,
    "tags": tags.checked_tags,
    "depends_on": lambda ids: list(dict.fromkeys(each.lower() for each in ids)),
}
"""The fields of a patch that are converted before they are stored, and their conversion functions."""


def _check_changeable(row: TaskRow, given: Mapping[str, Any]) -> None:
    """Raise `Conflict` if the task's current status does not allow changes to the given fields."""
    if row.status in ("pending", "blocked"):
        return
    names = sorted(given.keys() - (ALWAYS if row.status in TERMINAL else WHILE_LEASED))
    if names and row.status in TERMINAL:
        raise Conflict(
            f"The task is {row.status}; only tags and metadata can still be changed.",
            code="task_terminal",
            current_status=row.status,
        )
    if names:
        raise Conflict(
            f"{', '.join(names)} cannot be changed while the task is {row.status}.", current_status=row.status
        )


def _depends_on(starts: Sequence[str], target: str) -> bool:
    """Return whether any of the tasks in `starts` depends on `target`, directly or indirectly."""
    if not starts:
        return False
    first = Dependency.select(Dependency.needs_id).where(Dependency.task_id.in_(list(starts)))
    needed = first.cte("needed", recursive=True, columns=("id",))
    more = Dependency.select(Dependency.needs_id).join(needed, on=(Dependency.task_id == needed.c.id))
    every = needed.union(more)
    return every.select_from(every.c.id).where(every.c.id == target).limit(1).tuples().first() is not None


def _status_by_dependencies(row: TaskRow) -> str:
    """Return `dead`, `blocked` or `pending`, depending on the dependencies of the task.

    The result is `dead` if a dependency failed, was cancelled, or was deleted before it completed. Otherwise, the
    result is `blocked` if a dependency is not completed yet, and `pending` if all dependencies are completed.
    """
    needed = (
        Dependency.select(Task.status)
        .join(Task, on=(Task.id == Dependency.needs_id))
        .where(Dependency.task_id == row.id)
    )
    states = {status for (status,) in rows.fetch_tuples(needed)}
    is_gone = row.failed_dependency_id is not None and rows.find_task(row.failed_dependency_id) is None
    if is_gone or states & {"failed", "cancelled"}:
        return "dead"
    return "blocked" if states - {"completed"} else "pending"


def _state_after_retry(row: TaskRow) -> str:
    """Return the status of a task after a retry. Raise `Conflict` if the task cannot be retried."""
    if row.status == "completed":
        raise task_ended_error(row)
    if row.status not in ("failed", "cancelled"):
        raise Conflict(
            f"The task is {row.status}; only failed and cancelled tasks can be retried.", current_status=row.status
        )
    state = _status_by_dependencies(row)
    if state == "dead":
        raise Conflict(
            "A task that this task depends on did not complete; retry that task first, or create this task again.",
            current_status=row.status,
        )
    return state


def _check_schema(schema: Any, value: Any, pointer: str, what: str) -> None:
    """Raise `Invalid` with the code `schema_mismatch` if a schema is given and the value does not match it."""
    faults = json_schema_errors(schema, value, pointer_prefix=pointer) if schema is not None else ()
    if faults:
        raise Invalid(
            f"The value does not match {what} in {len(faults)} place{'' if len(faults) == 1 else 's'}.",
            code="schema_mismatch",
            errors=faults,
        )


def task_ended_error(row: TaskRow) -> Conflict:
    """Return the error for an action on a task that has ended."""
    return Conflict(
        f"The task has already ended with the status {row.status}.", code="task_terminal", current_status=row.status
    )
