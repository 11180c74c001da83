"""Creation of tasks, and the validation of the fields that owners set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Fault, Invalid, TooMany
from corral.http.answers import Encoded
from corral.ids import new_id
from corral.schema.data import check_user_schema
from corral.schema.fields import trimmed
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import NewTask, Origin, ReviewPolicy
from corral_plugins.tasks.events import TaskCreated
from corral_plugins.tasks.models import NO_DEADLINE, PRIORITIES, Dependency, Task
from corral_plugins.tasks.service import queues, rollups, rows, views
from corral_plugins.tasks.service.queues import has_tools
from corral_plugins.tasks.service.rows import TaskRow
from corral_plugins.tasks.service.transitions import Transitions, publish, queue_key, queued_columns

INPUT_LIMIT, METADATA_LIMIT = 256 * 1024, 16 * 1024

_DEPEND = Statement(lambda p: Dependency.insert({Dependency.task_id: p("task"), Dependency.needs_id: p("needs")}))
_NEEDED = Statement(
    lambda p: rows.shared(Task.select(Task.status).where(Task.id == p("id"))).tuples()
)  # a dependency cannot end between this look and our commit
_encode = msgspec.json.Encoder().encode


def future(moment: datetime | None, pointer: str) -> str | None:
    """An instant that is not past; `in_the_past`."""
    found = instant(moment)
    if found is not None and found <= clock.now():
        raise Invalid.at(pointer, "in_the_past", "This time has passed.")
    return found


def instant(moment: datetime | None) -> str | None:
    """As rows keep it."""
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


def given_in(shape: msgspec.Struct) -> dict[str, Any]:
    """The fields of a shape by name."""
    return {name: getattr(shape, name) for name in shape.__struct_fields__}


def as_text(value: Any) -> str | None:
    """A JSON column."""
    return None if value is None else _encode(value).decode()


def warnings_of(agent: AgentFacts | None, tools: Sequence[str]) -> list[str]:
    """What may keep a task from being claimed, though it is accepted."""
    if agent is None:
        return []
    warnings = [] if agent.status in ("idle", "busy") else ["agent_not_started"]
    return warnings + [f"tool_not_enabled:{tool}" for tool in queues.missing_tools(agent.enabled_tools, tools)]


def named_agent(agents: Agents, agent_id: str | None, role: str | None) -> AgentFacts | None:
    """The agent that a task names; 422 for one that does not exist, or beside a role."""
    if agent_id is not None and role is not None:
        raise Invalid.at("/agent_role", "not_allowed", "Name an agent or a role, not both.")
    if agent_id is None:
        return None
    agent = agents.facts(agent_id.lower())
    if agent is None:
        raise Invalid.at("/agent_id", "unknown_reference", "There is no such agent.", problem="unknown_reference")
    return agent


def waits_for(ids: Sequence[str]) -> bool:
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


def depend(task_id: str, needed: Sequence[str]) -> None:
    """Have a task wait for others."""
    for each in needed:
        _DEPEND.run({"task": task_id, "needs": each})


MAX_DEPTH, MAX_CHILDREN = 5, 50

_DEFAULTS: dict[str, Any] = {
    field.name: field.default if not callable(field.default) else None for field in Task._meta.sorted_fields
}
_INSERT = Statement(lambda p: Task.insert({field: p(field.name) for field in Task._meta.sorted_fields}))
_CHILDREN = Statement(lambda p: Task.select(Task.id).where(Task.parent_task_id == p("id")).limit(MAX_CHILDREN).tuples())


class Creation:
    """Joins the caller's unit."""

    def __init__(self, transitions: Transitions) -> None:
        self._transitions, self._settings, self._agents = transitions, transitions.settings, transitions.agents

    def create(self, new: NewTask, *, by: Principal, source: dict[str, Any] | None, origin: Origin) -> Encoded:
        """Check, insert, and answer the task with its warnings."""
        self._within_quota(by)
        title = trimmed(new.title)
        if not title:
            raise Invalid.at("/title", "too_short", "A title has at least 1 character that is not blank.")
        instants = {"deadline": future(new.deadline, "/deadline"), "available_at": instant(new.available_at)}
        agent = named_agent(self._agents, new.agent_id, new.agent_role)
        check_values(given_in(new))
        if new.output_schema is not None:
            check_user_schema(new.output_schema, pointer_prefix="/output_schema")
        # Locked: its children are counted, and what remains of its money is given away.
        parent_id = origin.parent_task_id or by.task_id
        parent = rows.lock(parent_id) if parent_id is not None else None
        family = _family(origin, parent)
        if parent is not None:
            new = _within(new, parent)
        is_blocked = waits_for(new.depends_on)
        values = self._values(new, title, instants, by, source, family, is_blocked=is_blocked)
        _INSERT.run(values)
        depend(values["id"], list(dict.fromkeys(each.lower() for each in new.depends_on)))
        rollups.count_transition(None, values["status"], values["priority"], by.user_id)
        row = TaskRow(*[values[name] for name in TaskRow.__struct_fields__])
        publish(TaskCreated, row, None)
        full = [values[name] for name in views.FULL_NAMES]
        body = views.encode_row(full, full=True, warnings=warnings_of(agent, new.required_tools))
        return Encoded(body, row.id, 1)

    def _values(
        self,
        new: NewTask,
        title: str,
        instants: dict[str, str | None],
        by: Principal,
        source: dict[str, Any] | None,
        family: Family,
        *,
        is_blocked: bool,
    ) -> dict[str, Any]:
        now = clock.now()
        tools = new.required_tools
        key = queue_key(new.agent_id and new.agent_id.lower(), new.agent_role, tools)
        priority = PRIORITIES.index(new.priority)
        policy = new.retry_policy
        told = source or _source_of(by)
        values = {
            **_DEFAULTS,
            "id": new_id(),
            "version": 1,
            "status": "blocked" if is_blocked else "pending",
            "priority": priority,
            "rank": priority,
            "deadline_key": instants["deadline"] or NO_DEADLINE,
            "queue_key": key,
            "created_at": now,
            "updated_at": now,
            "created_by": by.user_id,
            "title": title,
            "description": new.description,
            "instructions": new.instructions,
            "agent_id": new.agent_id and new.agent_id.lower(),
            "agent_role": new.agent_role,
            "deadline": instants["deadline"],
            "available_at": instants["available_at"] or now,
            "timeout_seconds": new.timeout_seconds or self._settings.get(declared.TIMEOUT_SECONDS),
            "queue_timeout_seconds": new.queue_timeout_seconds,
            "max_cost_micro": micro(new.max_cost_usd),
            "max_attempts": policy.max_attempts if policy is not None else self._settings.get(declared.MAX_ATTEMPTS),
            "source_type": told["type"],
            "source_id": told.get("id"),
            "cause_chain": as_text(list(family.cause_chain)),
            "parent_task_id": family.parent_task_id,
            "depth": family.depth,
            "workflow_run_id": family.workflow_run_id,
            "step_run_id": family.step_run_id,
            "tainted": family.tainted,
            "taint_sources": as_text(list(family.taint_sources)) if family.tainted else None,
            "artifacts": "[]",
            "input": as_text(new.input),
            "required_tools": as_text(tools),
            "depends_on": as_text([each.lower() for each in new.depends_on]),
            "tags": as_text(new.tags),
            "metadata": as_text(new.metadata),
            "allowed_tools": as_text(new.allowed_tools),
            "retry_policy": as_text(policy),
            "stall_policy": as_text(new.stall_policy),
            "review_policy": as_text(new.review_policy),
            "output_schema": as_text(new.output_schema),
        }
        if not is_blocked:
            values.update(
                queued_columns(
                    self._settings,
                    key=key,
                    priority=priority,
                    deadline=values["deadline"],
                    queue_timeout=new.queue_timeout_seconds,
                    available_at=values["available_at"],
                )
            )
        return values

    def _within_quota(self, by: Principal) -> None:
        if by.user_id is None:
            return
        most = self._settings.get(declared.MAX_OPEN)
        if rollups.open_tasks(by.user_id) >= most:
            raise TooMany(f"You have {most} unfinished tasks, which is the most.", code="quota_exceeded")


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """Where a new task stands among others."""

    parent_task_id: str | None = None
    depth: int = 0
    cause_chain: tuple[str, ...] = ()
    workflow_run_id: str | None = None
    step_run_id: str | None = None
    tainted: bool = False
    taint_sources: tuple[str, ...] = ()


def _family(origin: Origin, parent: TaskRow | None) -> Family:
    """What a delegated task takes from its parent: depth, causes, taint."""
    family = Family(
        cause_chain=origin.cause_chain,
        workflow_run_id=origin.workflow_run_id,
        step_run_id=origin.step_run_id,
        tainted=origin.tainted,
    )
    if parent is None:
        return family
    if parent.depth >= MAX_DEPTH:
        raise Invalid(f"Tasks are delegated at most {MAX_DEPTH} levels deep.")
    if len(_CHILDREN.rows({"id": parent.id})) >= MAX_CHILDREN:
        raise Invalid(f"A task delegates at most {MAX_CHILDREN} tasks.")
    causes = (*rows.parsed(parent.cause_chain), parent.id)
    return msgspec.structs.replace(
        family,
        parent_task_id=parent.id,
        depth=parent.depth + 1,
        cause_chain=family.cause_chain or causes,
        tainted=family.tainted or bool(parent.tainted),
        taint_sources=(f"task:{parent.id}",) if parent.tainted else (),
    )


def _within(new: NewTask, parent: TaskRow) -> NewTask:
    """What a delegated task may call and spend: never more tools than its parent, and what remains of its money."""
    allowed, tools = rows.parsed(parent.allowed_tools), new.allowed_tools
    if allowed is not None:
        tools = allowed if tools is None else [tool for tool in tools if has_tools(allowed, [tool])]
    cost = new.max_cost_usd
    if parent.max_cost_micro is not None:
        left = max(0, parent.max_cost_micro - parent.cost_micro) / 1e6
        cost = left if cost is None else min(cost, left)
    return msgspec.structs.replace(new, allowed_tools=tools, max_cost_usd=cost)


def _source_of(by: Principal) -> dict[str, Any]:
    if by.kind == "agent":
        return {"type": "agent", "id": by.agent_id}
    return {"type": "api" if by.kind == "api_key" else "user", "id": by.user_id}
