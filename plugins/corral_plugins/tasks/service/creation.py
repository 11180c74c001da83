"""New tasks, and what owners change in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.database.statement import Statement
from corral.errors import Conflict, Fault, Invalid, TooMany
from corral.http.answers import Encoded, IfMatch
from corral.ids import new_id
from corral.schema import check_user_schema, trimmed
from corral_plugins.agents.api import AgentFacts
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import NewTask, Origin, ReviewPolicy
from corral_plugins.tasks.events import TaskCreated, TaskUpdated
from corral_plugins.tasks.models import NO_DEADLINE, PRIORITIES, TERMINAL, Dependency, Task
from corral_plugins.tasks.service import queues, rows, tallies, views
from corral_plugins.tasks.service.moves import Moves, move, queue_key, queued_columns, tell, toolset_digest
from corral_plugins.tasks.service.rows import Row
from corral_plugins.tasks.shapes import TaskPatch

INPUT_LIMIT, METADATA_LIMIT = 256 * 1024, 16 * 1024
MAX_DEPTH, MAX_CHILDREN = 5, 50
ALWAYS = frozenset({"tags", "metadata"})
WHILE_LEASED = ALWAYS | {"title", "description", "deadline", "priority"}

_JSON = {"required_tools", "allowed_tools", "depends_on", "retry_policy", "stall_policy", "review_policy", "cause_chain",
         "tags", "metadata", "artifacts", "output_schema", "input"}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    field.name: field.default if not callable(field.default) else None for field in Task._meta.sorted_fields
}
_INSERT = Statement(lambda p: Task.insert({field: p(field.name) for field in Task._meta.sorted_fields}))
_DEPEND = Statement(lambda p: Dependency.insert({Dependency.task_id: p("task"), Dependency.needs_id: p("needs")}))
_NEEDED = Statement(
    lambda p: rows.shared(Task.select(Task.status).where(Task.id == p("id"))).tuples()
)  # a dependency cannot end between this look and our commit
_CHILDREN = Statement(lambda p: Task.select(Task.id).where(Task.parent_task_id == p("id")).limit(MAX_CHILDREN).tuples())
_encode = msgspec.json.Encoder().encode


class Creation:
    """Joins the caller's unit."""

    def __init__(self, moves: Moves) -> None:
        self._moves, self._settings, self._agents = moves, moves.settings, moves.agents

    # -- new

    def create(self, new: NewTask, *, by: Principal, source: dict[str, Any] | None, origin: Origin) -> Encoded:
        """Check, insert, and answer the task with its warnings."""
        self._within_quota(by)
        title = trimmed(new.title)
        if not title:
            raise Invalid.at("/title", "too_short", "A title has at least 1 character that is not blank.")
        instants = {"deadline": future(new.deadline, "/deadline"), "available_at": _instant(new.available_at)}
        agent = self._agent(new.agent_id, new.agent_role)
        check_values(_given(new))
        if new.output_schema is not None:
            check_user_schema(new.output_schema, pointer_prefix="/output_schema")
        family = self._family(by, origin)
        is_blocked = self._needs(new.depends_on)
        values = self._values(new, title, instants, by, source, family, is_blocked=is_blocked)
        _INSERT.run(values)
        for needs in dict.fromkeys(new.depends_on):
            _DEPEND.run({"task": values["id"], "needs": needs.lower()})
        tallies.moved(None, values["status"], values["priority"], by.user_id)
        row = Row(*[values[name] for name in Row.__struct_fields__])
        tell(TaskCreated, row, None)
        full = [values[name] for name in views.FULL_NAMES]
        body = views.encode_row(full, full=True, warnings=_warnings(agent, new.required_tools))
        return Encoded(body, row.id, 1)

    def _values(
        self, new: NewTask, title: str, instants: dict[str, str | None], by: Principal, source: dict[str, Any] | None,
        family: Family, *, is_blocked: bool,
    ) -> dict[str, Any]:  # fmt: skip
        now = clock.now()
        tools = new.required_tools
        key = queue_key(new.agent_id and new.agent_id.lower(), new.agent_role, tools)
        if tools:
            queues.keep_toolset(toolset_digest(tools), tools)
        priority = PRIORITIES.index(new.priority)
        policy = new.retry_policy
        told = source or _source_of(by)
        values = {
            **_DEFAULTS, "id": new_id(), "version": 1, "status": "blocked" if is_blocked else "pending",
            "priority": priority, "rank": priority, "deadline_key": instants["deadline"] or NO_DEADLINE, "queue_key": key,
            "created_at": now, "updated_at": now, "created_by": by.user_id, "title": title, "description": new.description,
            "instructions": new.instructions, "agent_id": new.agent_id and new.agent_id.lower(), "agent_role": new.agent_role,
            "deadline": instants["deadline"], "available_at": instants["available_at"] or now,
            "timeout_seconds": new.timeout_seconds or self._settings.get(declared.TIMEOUT_SECONDS),
            "queue_timeout_seconds": new.queue_timeout_seconds,
            "max_cost_micro": micro(new.max_cost_usd),
            "max_attempts": policy.max_attempts if policy is not None else self._settings.get(declared.MAX_ATTEMPTS),
            "source_type": told["type"], "source_id": told.get("id"), "cause_chain": _text(list(family.cause_chain)),
            "parent_task_id": family.parent_task_id, "depth": family.depth, "workflow_run_id": family.workflow_run_id,
            "step_run_id": family.step_run_id, "tainted": family.tainted, "artifacts": "[]",
            "input": _text(new.input), "required_tools": _text(tools), "depends_on": _text([each.lower() for each in new.depends_on]),
            "tags": _text(new.tags), "metadata": _text(new.metadata), "allowed_tools": _text(new.allowed_tools),
            "retry_policy": _text(policy), "stall_policy": _text(new.stall_policy), "review_policy": _text(new.review_policy),
            "output_schema": _text(new.output_schema),
        }  # fmt: skip
        if not is_blocked:
            values.update(
                queued_columns(
                    self._settings, key=key, priority=priority, deadline=values["deadline"],
                    queue_timeout=new.queue_timeout_seconds, available_at=values["available_at"],
                )
            )  # fmt: skip
        return values

    def _within_quota(self, by: Principal) -> None:
        if by.user_id is None:
            return
        most = self._settings.get(declared.MAX_OPEN)
        if tallies.open_of(by.user_id) >= most:
            raise TooMany(f"You have {most} unfinished tasks, which is the most.", code="quota_exceeded")

    def _agent(self, agent_id: str | None, role: str | None) -> AgentFacts | None:
        if agent_id is not None and role is not None:
            raise Invalid.at("/agent_role", "not_allowed", "Name an agent or a role, not both.")
        if agent_id is None:
            return None
        agent = self._agents.facts(agent_id.lower())
        if agent is None:
            raise Invalid.at("/agent_id", "unknown_reference", "There is no such agent.", problem="unknown_reference")
        return agent

    def _family(self, by: Principal, origin: Origin) -> Family:
        """What a delegated task takes from its parent: depth, causes, taint."""
        parent_id = origin.parent_task_id or by.task_id
        family = Family(
            cause_chain=origin.cause_chain, workflow_run_id=origin.workflow_run_id, step_run_id=origin.step_run_id,
            tainted=origin.tainted,
        )  # fmt: skip
        parent = rows.find(parent_id) if parent_id is not None else None
        if parent is None:
            return family
        if parent.depth >= MAX_DEPTH:
            raise Invalid(f"Tasks are delegated at most {MAX_DEPTH} levels deep.")
        if len(_CHILDREN.rows({"id": parent.id})) >= MAX_CHILDREN:
            raise Invalid(f"A task delegates at most {MAX_CHILDREN} tasks.")
        causes = (*rows.parsed(parent.cause_chain), parent.id)
        return msgspec.structs.replace(
            family, parent_task_id=parent.id, depth=parent.depth + 1, cause_chain=family.cause_chain or causes,
            tainted=family.tainted or bool(parent.tainted),
        )  # fmt: skip

    @staticmethod
    def _needs(ids: Sequence[str]) -> bool:
        """Whether some dependency is still open; 422 for those that are unknown or will never complete."""
        faults, is_open = [], False
        for index, needed in sorted(enumerate(ids), key=lambda pair: pair[1]):
            found = _NEEDED.one({"id": needed.lower()})
            if found is None:
                faults.append(Fault(f"/depends_on/{index}", "unknown_reference", "There is no such task."))
            elif found[0] in ("failed", "cancelled"):
                faults.append(
                    Fault(f"/depends_on/{index}", "not_allowed", f"This task is {found[0]} and will not complete.")
                )
            else:
                is_open = is_open or found[0] != "completed"
        if faults:
            code = "unknown_reference" if all(fault.code == "unknown_reference" for fault in faults) else None
            raise Invalid(f"{len(faults)} dependencies cannot be waited for.", code=code, errors=faults)
        return is_open

    # -- changed

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
        given = {name: value for name, value in _given(patch).items() if value is not UNSET}
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
            changes["available_at"] = _instant(changes["available_at"])
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
        if to != row.status:
            move(row, to, event=TaskUpdated, **changes)
        else:
            rows.change(row, changes)
            tell(TaskUpdated, row, row.status)
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
            agent = self._agent(agent_id, role)
            tools = given.get("required_tools", rows.parsed(row.required_tools))
            if tools:
                queues.keep_toolset(toolset_digest(tools), tools)
            changes["queue_key"] = row.queue_key = queue_key(agent_id, role, tools)
            warnings = _warnings(agent, tools)
        if row.status != "pending":
            return warnings
        priority = changes.get("priority", row.priority)
        if "available_at" in given or "queue_timeout_seconds" in given:
            columns = queued_columns(
                self._settings, key=row.queue_key, priority=priority, deadline=changes.get("deadline", row.deadline),
                queue_timeout=changes.get("queue_timeout_seconds", row.queue_timeout_seconds),
                available_at=changes.get("available_at", row.available_at),
            )  # fmt: skip
            changes.update(columns)
        elif "queue_key" in changes and row.queue is not None and row.queue != "held":
            changes["queue"] = row.queue_key
        if "priority" in changes:
            changes["rank"] = priority
        return warnings

    def _reneed(self, row: Row, ids: Sequence[str], changes: dict[str, Any]) -> str:
        """Set the dependencies anew; the status that follows."""
        wanted = list(dict.fromkeys(each.lower() for each in ids))
        if row.id in wanted:
            raise Invalid.at("/depends_on", "cycle", "A task cannot depend on itself.", problem="cycle")
        is_open = self._needs(wanted)
        if _reaches(wanted, row.id):
            raise Invalid.at("/depends_on", "cycle", "One of these depends on this task.", problem="cycle")
        Dependency.delete().where(Dependency.task_id == row.id).execute()
        for needs in wanted:
            _DEPEND.run({"task": row.id, "needs": needs})
        changes["depends_on"] = wanted
        if is_open:
            changes.update(queue=None, queue_until=None, rank_at=None, queued_at=None)
            return "blocked"
        if row.status == "blocked":
            changes.update(self._moves.queued(row, available_at=max(row.available_at, clock.now())))
        return "pending"


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """Where a new task stands among others."""

    parent_task_id: str | None = None
    depth: int = 0
    cause_chain: tuple[str, ...] = ()
    workflow_run_id: str | None = None
    step_run_id: str | None = None
    tainted: bool = False


def future(moment: datetime | None, pointer: str) -> str | None:
    """An instant that is not past; `in_the_past`."""
    instant = _instant(moment)
    if instant is not None and instant <= clock.now():
        raise Invalid.at(pointer, "in_the_past", "This time has passed.")
    return instant


def _instant(moment: datetime | None) -> str | None:
    return None if moment is None else clock.from_datetime(moment)


def micro(usd: float | None) -> int | None:
    """Micro-USD."""
    return None if usd is None else math.floor(usd * 1_000_000 + 0.5)


def check_values(given: Mapping[str, Any]) -> None:
    """Limits that a type cannot say, and what needs a plugin that is not there."""
    for name, limit in (("input", INPUT_LIMIT), ("metadata", METADATA_LIMIT)):
        if given.get(name) and len(_encode(given[name])) > limit:
            raise Invalid.at(f"/{name}", "too_long", f"at most {limit // 1024} KiB of JSON")
    review = given.get("review_policy")
    if isinstance(review, ReviewPolicy) and review.mode != "none":
        raise Invalid.at(
            "/review_policy/mode", "not_allowed", "Reviews need the plugin code_reviews, which is not active."
        )


def _given(shape: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in shape.__struct_fields__}


def _text(value: Any) -> str | None:
    return None if value is None else _encode(value).decode()


def _source_of(by: Principal) -> dict[str, Any]:
    if by.kind == "agent":
        return {"type": "agent", "id": by.agent_id}
    return {"type": "api" if by.kind == "api_key" else "user", "id": by.user_id}


def _warnings(agent: AgentFacts | None, tools: Sequence[str]) -> list[str]:
    if agent is None:
        return []
    warnings = [] if agent.status in ("idle", "busy") else ["agent_not_started"]
    return warnings + [f"tool_not_enabled:{tool}" for tool in queues.missing_tools(agent.enabled_tools, tools)]


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
