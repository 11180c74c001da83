"""What owners set: limits that a type cannot say, references, and how values become columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from corral import clock
from corral.database.statement import Statement
from corral.errors import Fault, Invalid
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tasks.api import ReviewPolicy
from corral_plugins.tasks.models import Dependency, Task
from corral_plugins.tasks.service import queues, rows

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
