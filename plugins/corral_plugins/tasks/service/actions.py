"""Actions and actions of the owner of a task: patch, cancel, retry, answer, end, delete, comment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.errors import Conflict, Fault, Forbidden, Invalid
from corral.http.answers import ANY_VERSION, Encoded, IfMatch
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Audit, AuditEntry
from corral.schema.data import check_user_schema, json_schema_problems
from corral.schema.fields import trimmed
from corral_plugins.tasks.events import TaskDeleted, TaskRetried, TaskUpdated
from corral_plugins.tasks.models import NO_DEADLINE, PRIORITIES, TERMINAL, Comment, Dependency, Task
from corral_plugins.tasks.reports import ReportedError
from corral_plugins.tasks.service import queries, rollups, rows, search, views
from corral_plugins.tasks.service.creation import (
    check_values,
    depend,
    future,
    given_in,
    instant,
    micro,
    named_agent,
    waits_for,
    warnings_of,
)
from corral_plugins.tasks.service.dependencies import Dependencies
from corral_plugins.tasks.service.outcomes import NOT_WAITING, Outcomes
from corral_plugins.tasks.service.rows import TaskRow
from corral_plugins.tasks.service.runs import RESULT_LIMIT, as_json
from corral_plugins.tasks.service.transitions import (
    NOT_CANCELLED,
    Transitions,
    aged_columns,
    publish,
    queue_key,
    queued_columns,
    transition,
)
from corral_plugins.tasks.shapes import CommentView, NewComment, TaskPatch
from corral_plugins.tools.api import Tools

ALWAYS = frozenset({"tags", "metadata"})
QUEUEING = frozenset({"priority", "agent_id", "agent_role", "required_tools", "available_at", "queue_timeout_seconds"})
"""What says where a task stands in which queue, and how long."""
WHILE_LEASED = ALWAYS | {"title", "description", "deadline", "priority"}


def _allowed(row: TaskRow, given: Mapping[str, Any]) -> None:
    """Which fields the state lets change."""
    if row.status in ("pending", "blocked"):
        return
    names = sorted(given.keys() - (ALWAYS if row.status in TERMINAL else WHILE_LEASED))
    if names and row.status in TERMINAL:
        raise Conflict(
            f"The task is {row.status}: only tags and metadata change.", code="task_terminal", current_status=row.status
        )
    if names:
        raise Conflict(f"{', '.join(names)} cannot change while the task is {row.status}.", current_status=row.status)


def _reaches(starts: Sequence[str], target: str) -> bool:
    """Whether the target is among what the starts depend on, directly or not."""
    if not starts:
        return False
    first = Dependency.select(Dependency.needs_id).where(Dependency.task_id.in_(list(starts)))
    needed = first.cte("needed", recursive=True, columns=("id",))
    more = Dependency.select(Dependency.needs_id).join(needed, on=(Dependency.task_id == needed.c.id))
    every = needed.union(more)
    return every.select_from(every.c.id).where(every.c.id == target).limit(1).tuples().first() is not None


class Actions:
    """Joins the caller's unit; every change answers the task as it is then."""

    audit: Audit | None
    tools: Tools | None

    def __init__(self, transitions: Transitions, outcomes: Outcomes, dependencies: Dependencies) -> None:
        self._transitions, self._outcomes, self._dependencies = transitions, outcomes, dependencies
        self._settings, self._agents = transitions.settings, transitions.agents

    def _owned(self, task_id: str, match: IfMatch, by: Principal) -> TaskRow:
        row = rows.lock(task_id)
        require_owner(by, row.created_by, what="task", manage="tasks.manage")
        match.check(row.version)
        return row

    # -- patch

    def patch(self, task_id: str, patch: TaskPatch, match: IfMatch, *, by: Principal) -> Encoded:
        """Change what the state allows; an empty body changes nothing."""
        if patch.status is not UNSET:
            raise Invalid.at(
                "/status",
                "not_allowed",
                "States change by actions: cancel, retry, complete, fail.",
                problem="use_action",
            )
        row = rows.lock(task_id)
        require_owner(by, row.created_by, what="task", manage="tasks.manage")
        match.check(row.version)
        given = {name: value for name, value in given_in(patch).items() if value is not UNSET}
        if not given:
            return views.answer(row.id, row.version)
        _allowed(row, given)
        warnings = self._apply(row, given)
        return views.answer(row.id, row.version, warnings=warnings)

    def _apply(self, row: TaskRow, given: dict[str, Any]) -> list[str]:
        check_values(given)
        changes = {
            name: value for name, value in given.items() if name not in ("priority", "max_cost_usd", "depends_on")
        }
        if "title" in changes:
            changes["title"] = trimmed(changes["title"])
            if not changes["title"]:
                raise Invalid.at("/title", "too_short", "A title has at least 1 character that is not blank.")
        if changes.get("output_schema") is not None:
            check_user_schema(changes["output_schema"], pointer_prefix="/output_schema")
        if "deadline" in changes:
            changes["deadline"] = future(changes["deadline"], "/deadline")
            changes["deadline_key"] = changes["deadline"] or NO_DEADLINE
        if "available_at" in changes:
            changes["available_at"] = instant(changes["available_at"])
        if "max_cost_usd" in given:
            changes["max_cost_micro"] = micro(given["max_cost_usd"])
        if isinstance(changes.get("agent_id"), str):
            changes["agent_id"] = changes["agent_id"].lower()
        if given.get("retry_policy") is not None:
            changes["max_attempts"] = given["retry_policy"].max_attempts
        before = row.priority
        if "priority" in given:
            changes["priority"] = PRIORITIES.index(given["priority"])
        warnings = self._requeue(row, changes, given)
        to = self._reneed(row, given["depends_on"], changes) if "depends_on" in given else row.status
        if changes.get("priority", before) != before:
            rollups.count_priority_change(row.status, before, changes["priority"])
        row.priority = changes.get("priority", before)
        old = search.known(row) if changes.keys() & {"title", "description"} else None
        if to != row.status:
            transition(row, to, event=TaskUpdated, **changes)
        else:
            rows.change(row, changes)
            publish(TaskUpdated, row, row.status)
        search.rewrite(old, row)
        return warnings

    def _requeue(self, row: TaskRow, changes: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
        """Who may take it changes its queue; so do priority and time."""
        warnings: list[str] = []
        if given.keys() & {"agent_id", "agent_role", "required_tools"}:
            agent_id, role = changes.get("agent_id", row.agent_id), changes.get("agent_role", row.agent_role)
            if "agent_id" in given and given["agent_id"] is not None and "agent_role" not in given:
                role = changes["agent_role"] = None
            elif "agent_role" in given and given["agent_role"] is not None and "agent_id" not in given:
                agent_id = changes["agent_id"] = None
            agent = named_agent(self._agents, agent_id, role)
            tools = given.get("required_tools", rows.parsed(row.required_tools))
            changes["queue_key"] = row.queue_key = queue_key(agent_id, role, tools)
            warnings = warnings_of(agent, tools)
        if row.status == "pending" and given.keys() & QUEUEING:
            changes.update(self._place(row, changes))
        return warnings

    def _place(self, row: TaskRow, changes: dict[str, Any]) -> dict[str, Any]:
        """The place of a pending task in its queue; what it has waited counts on, unless it is put off."""
        available_at = changes.get("available_at", row.available_at)
        if row.queue is None or row.queued_at is None or available_at > clock.now():
            return self._queued(row, changes, available_at)
        priority = changes.get("priority", row.priority)
        seconds = changes.get("queue_timeout_seconds", row.queue_timeout_seconds)
        until = clock.format_instant(clock.parse_instant(row.queued_at) + seconds) if seconds else None
        queue = row.queue if row.queue == "held" else row.queue_key
        aged = aged_columns(self._settings, priority=priority, queued_at=row.queued_at)
        return {"queue": queue, "queue_until": until, **aged}

    def _queued(self, row: TaskRow, changes: dict[str, Any], available_at: str) -> dict[str, Any]:
        """The columns of a task that becomes pending with these changes."""
        return queued_columns(
            self._settings,
            key=row.queue_key,
            priority=changes.get("priority", row.priority),
            deadline=changes.get("deadline", row.deadline),
            available_at=available_at,
            queue_timeout=changes.get("queue_timeout_seconds", row.queue_timeout_seconds),
        )

    def _reneed(self, row: TaskRow, ids: Sequence[str], changes: dict[str, Any]) -> str:
        """Set the dependencies anew; the status that follows."""
        wanted = list(dict.fromkeys(each.lower() for each in ids))
        if row.id in wanted:
            raise Invalid.at("/depends_on", "cycle", "A task cannot depend on itself.", problem="cycle")
        is_open = waits_for(wanted)
        if _reaches(wanted, row.id):
            raise Invalid.at("/depends_on", "cycle", "One of these depends on this task.", problem="cycle")
        Dependency.delete().where(Dependency.task_id == row.id).execute()
        depend(row.id, wanted)
        changes["depends_on"] = wanted
        if is_open:
            changes.update(queue=None, queue_until=None, rank_at=None, queued_at=None)
            return "blocked"
        if row.status == "blocked":
            available_at = max(changes.get("available_at", row.available_at), clock.now())
            changes.update(self._queued(row, changes, available_at))
        return "pending"

    # -- actions

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
        columns = self._transitions.queued(row) if state == "pending" else {"queue": None, "available_at": clock.now()}
        if row.deadline is not None and row.deadline <= clock.now():
            columns.update(deadline=None, deadline_key="9999-12-31T23:59:59.999Z")
        transition(
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
        self._dependencies.reblock(row.id)
        return views.answer(row.id, row.version)

    @staticmethod
    def _needs(row: TaskRow) -> str:
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

    def expire_input(self, row: TaskRow) -> None:
        """Nobody answered in time; the task goes on without."""
        call_id = rows.parsed(row.waiting_for).get("call_id")
        error = {"type": "expired", "message": "Nobody answered in time."}
        self._resume_with(row, call_id, '{"input":null,"input_expired":true}', None, error)

    def _resume_with(
        self, row: TaskRow, call_id: str | None, given: str, value: Any, error: dict[str, str] | None = None
    ) -> None:
        """`given` (JSON) for a run that waits; for one whose tool asked, the result of that call."""
        if call_id is not None:
            if self.tools is not None:
                self.tools.answered(row.id, call_id, result=value, error=error)
            status = "succeeded" if error is None else "failed"
            result = {"call_id": call_id, "status": status, "result": value, "error": error}
            given = as_json({"tool_results": [result]}, RESULT_LIMIT + 1024, "/input")
        self.resume(row, given)

    def resume(self, row: TaskRow, given: str) -> None:
        """A waiting task goes back to the queue with what it waited for (a JSON object)."""
        transition(
            row,
            "pending",
            event=TaskUpdated,
            resume=given,
            resuming=True,
            **NOT_WAITING,
            **self._transitions.queued(row),
        )

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

    def _ended_by_owner(self, task_id: str, by: Principal) -> TaskRow:
        row = self._owned(task_id, ANY_VERSION, by)
        if row.status in TERMINAL:
            raise terminal(row)
        return row

    def _told(self, row: TaskRow, attempt: rows.AttemptRow | None, action: str) -> Encoded:
        if attempt is not None:
            self._transitions.signal(attempt, "lost")
        if self.audit is not None:
            self.audit.record(AuditEntry(action=action, object_type="task", object_id=row.id))
        return views.answer(row.id, row.version)

    def delete(self, task_id: str, match: IfMatch = ANY_VERSION, *, by: Principal) -> None:
        """Remove an ended task; a job removes what hangs on it."""
        row = self._owned(task_id, match, by)
        if row.status not in TERMINAL:
            raise Conflict(f"The task is {row.status}; cancel it first.", current_status=row.status)
        remove(row)
        publish(TaskDeleted, row, row.status)

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
        publish(TaskUpdated, row, row.status)
        return CommentView(id=comment_id, author={"type": by.kind, "id": by.id}, body=new.body, created_at=now)


def remove(row: TaskRow) -> None:
    """Delete the row of an ended task; its ledger, logs and comments follow by a job."""
    search.forget(row)
    if row.status != "completed":  # what needs it cannot be tried again
        dependents = Dependency.select(Dependency.task_id).where(Dependency.needs_id == row.id)
        ended = Task.finished_at.is_null(False) & Task.failed_dependency_id.is_null()
        Task.update(failed_dependency_id=row.id).where(Task.id.in_(dependents) & ended).execute()
    Task.delete().where((Task.id == row.id) & (Task.status == row.status)).execute()
    # What others need of it stays until they go: a job may still have to tell them how it ended.
    Dependency.delete().where(Dependency.task_id == row.id).execute()
    rollups.count_transition(row.status, None, row.priority, row.created_by)
    queries.anchor_removed(row.created_at, row.id)
    enqueue("tasks.purge", task_id=row.id)


def _must_fit(schema: Any, value: Any, pointer: str, what: str) -> None:
    """`schema_mismatch` unless the value fits the schema, if there is one."""
    faults = json_schema_problems(schema, value, pointer_prefix=pointer) if schema is not None else ()
    if faults:
        raise Invalid(f"{len(faults)} places do not fit {what}.", code="schema_mismatch", errors=faults)


def terminal(row: TaskRow) -> Conflict:
    """The task has ended."""
    return Conflict(f"The task is {row.status}.", code="task_terminal", current_status=row.status)
