"""The task routes for people and agents."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import can_read
from corral.database.model import SHARED
from corral.errors import NotFound
from corral.events.log import EventView
from corral.http.answers import Encoded, IfMatch, Wait
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral_plugins.tasks.api import DIRECT_ORIGIN, NewTask
from corral_plugins.tasks.models import TERMINAL
from corral_plugins.tasks.service import run_reports as task_logs
from corral_plugins.tasks.service.actions import OwnerActions
from corral_plugins.tasks.service.creation import TaskCreation
from corral_plugins.tasks.service.explain import TaskExplanations
from corral_plugins.tasks.service.queries import TaskQueries
from corral_plugins.tasks.service.rows import TaskViews, find_readable_task
from corral_plugins.tasks.shapes import (
    AttemptView,
    CancelRequest,
    CommentView,
    Explanation,
    InputAnswer,
    LogQuery,
    LogView,
    NewComment,
    RetryRequest,
    TaskGetQuery,
    TaskItem,
    TaskPatch,
    TaskQuery,
    TaskStats,
    TaskStatsQuery,
    TaskView,
)

READ, WRITE, ACT = "tasks.read", "tasks.write", "tasks.act"
STATES = ("invalid_state", "task_terminal", "precondition_failed")

routes = Routes("/tasks", tag="Tasks")


@routes.get("/", needs=READ, raises=("invalid_cursor",))
def list_tasks(query: TaskQuery, queries: TaskQueries, caller: Principal) -> Page[TaskItem]:
    """List tasks, newest first, without their inputs and results."""
    return queries.list_tasks(query, caller)


@routes.post("/", needs=WRITE, status=201, redacted=True, raises=("unknown_reference", "cycle", "quota_exceeded"))
def create_task(body: NewTask, creation: TaskCreation, caller: Principal) -> TaskView | Encoded:
    """Create a task and queue it. The task is `blocked` until all tasks that it depends on are completed."""
    return creation.create(body, by=caller, source=None, origin=DIRECT_ORIGIN)


@routes.get("/stats", needs=READ)
def get_task_stats(query: TaskStatsQuery, queries: TaskQueries, caller: Principal) -> TaskStats:
    """Get task statistics. The response always contains every field."""
    return queries.stats(query, caller)


@routes.get("/{id}", needs=(READ, ACT), seconds=60.0)
def get_task(id: str, query: TaskGetQuery, views: TaskViews, caller: Principal) -> TaskView | Encoded | Wait:
    """Get a task.

    If `wait` is set, the response is delayed until the task has ended, but for no longer than `wait` seconds. A worker
    may read the tasks that it has claimed.
    """
    if caller.kind == "worker":
        find_readable_task(id, caller)
    elif not can_read(caller, SHARED, None):
        raise NotFound("There is no task with this id.")
    if query.wait and query.poll_deadline > clock.time_s() and not views.has_ended(id):
        return Wait((id,), query.poll_deadline)
    return views.encoded_task(id)


@routes.patch("/{id}", needs=WRITE, redacted=True, raises=(*STATES, "use_action", "unknown_reference", "cycle"))
def update_task(
    id: str, body: TaskPatch, changes: OwnerActions, caller: Principal, match: IfMatch
) -> TaskView | Encoded:
    """Change a task. The status of the task determines which fields can be changed."""
    return changes.patch(id, body, match, by=caller)


@routes.post("/{id}/cancel", needs=WRITE, redacted=True, also=(202,), raises=STATES)
def cancel_task(
    id: str, body: CancelRequest, actions: OwnerActions, caller: Principal, match: IfMatch
) -> TaskView | Encoded:
    """Cancel a task.

    The response status is 200 if the task has ended, or 202 if its worker still has to stop the run.
    """
    return actions.cancel(id, match, by=caller, reason=body.reason)


@routes.post("/{id}/retry", needs=WRITE, redacted=True, raises=STATES)
def retry_task(
    id: str, body: RetryRequest, actions: OwnerActions, caller: Principal, match: IfMatch
) -> TaskView | Encoded:
    """Retry a failed or cancelled task under the same id."""
    return actions.retry(id, match, by=caller, from_checkpoint=body.from_checkpoint, reason=body.reason)


@routes.delete("/{id}", needs=WRITE, raises=STATES)
def delete_task(id: str, actions: OwnerActions, caller: Principal, match: IfMatch) -> None:
    """Delete a task that has ended. Its cost remains in the cost statistics."""
    actions.delete(id, match, by=caller)


@routes.post("/{id}/input", needs=WRITE, redacted=True, raises=("invalid_state", "schema_mismatch"))
def give_task_input(id: str, body: InputAnswer, actions: OwnerActions, caller: Principal) -> TaskView | Encoded:
    """Answer the question that a task is waiting for."""
    return actions.give_input(id, body.input, by=caller)


@routes.get("/{id}/explain", needs=READ)
def explain_task(id: str, explanations: TaskExplanations, caller: Principal) -> Explanation:
    """Explain why a task is or is not running, or how it ended."""
    return explanations.explain(id, caller)


@routes.get("/{id}/attempts", needs=READ, raises=("invalid_cursor",))
def list_attempts(id: str, query: PageQuery, queries: TaskQueries, caller: Principal) -> Page[AttemptView]:
    """List the attempts of a task, oldest first."""
    return queries.attempts(id, query, caller)


@routes.get("/{id}/attempts/{fence}", needs=READ)
def get_attempt(id: str, fence: str, queries: TaskQueries, caller: Principal) -> AttemptView:
    """Get one attempt of a task."""
    if not (fence.isascii() and fence.isdigit() and len(fence) < 10):
        raise NotFound("The task has no attempt with this number.")
    return queries.attempt(id, int(fence), caller)


@routes.get("/{id}/logs", needs=READ, seconds=60.0)
def list_task_logs(id: str, query: LogQuery, caller: Principal) -> Page[LogView] | Wait:
    """List the log lines of an attempt, oldest first.

    If `wait` is set, the response is delayed until new lines arrive or the task ends, but for no longer than `wait`
    seconds.
    """
    row = find_readable_task(id, caller)
    found = task_logs.read_log_lines(id, query.fence if isinstance(query.fence, int) else row.fence, query)
    if not found and query.poll_deadline > clock.time_s() and row.status not in TERMINAL:
        # no event announces log lines, so a pending request polls twice per second
        return Wait((id,), min(query.poll_deadline, clock.time_s() + 0.5))
    return Page(items=found, total=None, limit=query.limit, offset=None, next=None)


@routes.get("/{id}/events", needs=READ, raises=("invalid_cursor",))
def list_task_events(id: str, query: PageQuery, queries: TaskQueries, caller: Principal) -> Page[EventView]:
    """List the events of a task, oldest first."""
    return queries.events(id, query, caller)


@routes.get("/{id}/artifacts", needs=READ, raises=("invalid_cursor",))
def list_task_artifacts(id: str, query: PageQuery, queries: TaskQueries, caller: Principal) -> Page[dict[str, Any]]:
    """List the artifacts of a task, oldest first."""
    return queries.artifacts(id, query, caller)


@routes.get("/{id}/comments", needs=READ, raises=("invalid_cursor",))
def list_task_comments(id: str, query: PageQuery, queries: TaskQueries, caller: Principal) -> Page[CommentView]:
    """List the comments on a task, oldest first."""
    return queries.comments(id, query, caller)


@routes.post("/{id}/comments", needs=(WRITE, ACT), status=201, lenient=True, redacted=True)
def add_task_comment(id: str, body: NewComment, actions: OwnerActions, caller: Principal) -> CommentView:
    """Add a comment to a task. The next claim of the task includes the comment."""
    return actions.add_comment(id, body, by=caller)
