"""What owners change in tasks, as far as the state allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.errors import Conflict, Invalid
from corral.http.answers import Encoded, IfMatch
from corral.schema.data import check_user_schema
from corral.schema.fields import trimmed
from corral_plugins.tasks.events import TaskUpdated
from corral_plugins.tasks.models import NO_DEADLINE, PRIORITIES, TERMINAL, Dependency
from corral_plugins.tasks.service import rows, search, tallies, views
from corral_plugins.tasks.service.fields import (
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
from corral_plugins.tasks.service.moves import Moves, aged_columns, move, queue_key, queued_columns, tell
from corral_plugins.tasks.service.rows import Row
from corral_plugins.tasks.shapes import TaskPatch

ALWAYS = frozenset({"tags", "metadata"})
QUEUEING = frozenset({"priority", "agent_id", "agent_role", "required_tools", "available_at", "queue_timeout_seconds"})
"""What says where a task stands in which queue, and how long."""
WHILE_LEASED = ALWAYS | {"title", "description", "deadline", "priority"}


class Changes:
    """Joins the caller's unit."""

    def __init__(self, moves: Moves) -> None:
        self._moves, self._settings, self._agents = moves, moves.settings, moves.agents

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

    def _apply(self, row: Row, given: dict[str, Any]) -> list[str]:
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
            tallies.reprioritised(row.status, before, changes["priority"])
        row.priority = changes.get("priority", before)
        old = search.known(row) if changes.keys() & {"title", "description"} else None
        if to != row.status:
            move(row, to, event=TaskUpdated, **changes)
        else:
            rows.change(row, changes)
            tell(TaskUpdated, row, row.status)
        search.rewrite(old, row)
        return warnings

    def _requeue(self, row: Row, changes: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
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

    def _place(self, row: Row, changes: dict[str, Any]) -> dict[str, Any]:
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

    def _queued(self, row: Row, changes: dict[str, Any], available_at: str) -> dict[str, Any]:
        """The columns of a task that becomes pending with these changes."""
        return queued_columns(
            self._settings,
            key=row.queue_key,
            priority=changes.get("priority", row.priority),
            deadline=changes.get("deadline", row.deadline),
            available_at=available_at,
            queue_timeout=changes.get("queue_timeout_seconds", row.queue_timeout_seconds),
        )

    def _reneed(self, row: Row, ids: Sequence[str], changes: dict[str, Any]) -> str:
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


def _allowed(row: Row, given: Mapping[str, Any]) -> None:
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
