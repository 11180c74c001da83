"""Creates tasks, and validates the task fields that a task's owner may set."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from peewee import SQL

from corral import clock
from corral.auth.principal import Principal
from corral.database.model import JSONField
from corral.database.statement import Parameter, Statement
from corral.database.unit import locked
from corral.errors import FieldError, Invalid, TooMany
from corral.http.answers import Encoded
from corral.ids import new_id
from corral.schema.json_schema_validation import check_user_schema
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.cost.api import Costs
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import NewTask, Origin, RetryPolicy, ReviewPolicy, TaskCreated, refuse_unenforced
from corral_plugins.tasks.models import EXTRA_DEFAULTS, NO_DEADLINE, PRIORITIES, Dependency, Task, TaskRow
from corral_plugins.tasks.service import rows, statistics
from corral_plugins.tasks.service.missing_tools import find_missing_tools
from corral_plugins.tasks.service.tags import add_tags, checked_tags
from corral_plugins.tasks.service.transitions import TaskTransitions, publish_task_event, queue_columns, queue_key
from corral_plugins.tools.api import Tools, includes_tools, missing_tools

INPUT_LIMIT, METADATA_LIMIT = 256 * 1024, 16 * 1024
MAX_DEPTH, MAX_CHILDREN = 5, 50
CACHED_PEOPLE = 10_000
CREATED_IN_A_SECOND = 20_000
"""An upper bound on the number of tasks that all processes together can create in one second."""

_ADD_DEPENDENCY = Statement(
    lambda p: Dependency.insert({Dependency.task_id: p("task"), Dependency.needs_id: p("needs")})
)
# Locked, so that a dependency cannot end between this read and the commit.
_STATUS_OF_DEPENDENCY = Statement(
    lambda p: locked(Task.select(Task.status).where(Task.id == p("id")), share=True).tuples()
)
_CHILDREN = Statement(lambda p: Task.select(Task.id).where(Task.parent_task_id == p("id")).limit(MAX_CHILDREN).tuples())

_encode = msgspec.json.Encoder().encode


# -- validation


def future_instant(moment: datetime | None, pointer: str) -> str | None:
    """Return a future time in the text format that the database stores, or None if `moment` is None.

    Raise `Invalid` with the code `in_the_past` if the time has passed.
    """
    found = instant_to_text(moment)
    if found is not None and found <= clock.now():
        raise Invalid.at(pointer, "in_the_past", "must be in the future")
    return found


def instant_to_text(moment: datetime | None) -> str | None:
    """Return the time in the text format that the database stores, or None if `moment` is None."""
    return None if moment is None else clock.from_datetime(moment)


def checked_title(text: str) -> str:
    """Return the title without surrounding white space. Raise `Invalid` if the title is blank."""
    title = text.strip()
    if not title:
        raise Invalid.at("/title", "too_short", "The title must contain a character other than white space.")
    return title


def given_members(policy: RetryPolicy | None) -> dict[str, Any] | None:
    """Return the fields of a retry policy that are set, or None if there is no policy."""
    return None if policy is None else msgspec.to_builtins(policy)


def check_limits(given: Mapping[str, Any], *, enforces_budgets: bool, performs_reviews: bool) -> None:
    """Raise `Invalid` if a value breaks a rule that the type annotations cannot express.

    `enforces_budgets` and `performs_reviews` say whether the plugins that enforce budgets and perform reviews are
    active.
    """
    for name, limit in (("input", INPUT_LIMIT), ("metadata", METADATA_LIMIT)):
        if given.get(name) and len(_encode(given[name])) > limit:
            raise Invalid.at(f"/{name}", "too_long", f"at most {limit // 1024} KiB of JSON")
    refuse_unenforced(given, enforces_budgets=enforces_budgets, performs_reviews=performs_reviews)
    if given.get("output_schema") is not None:
        check_user_schema(given["output_schema"], pointer_prefix="/output_schema")


def agent_warnings(agent: AgentFacts, tools: Sequence[str]) -> list[str]:
    """Return warnings if the task's agent is not started, or may not use a tool that the task requires.

    The task is accepted, but cannot be claimed until the agent is started and may use the required tools.
    """
    warnings = [] if agent.status in ("idle", "busy") else ["agent_not_started"]
    missing = missing_tools(agent.enabled_tools, tools) if tools else ()
    return warnings + [f"tool_not_enabled:{tool}" for tool in missing]


def find_named_agent(agents: Agents, agent_id: str | None, role: str | None) -> AgentFacts | None:
    """Return the agent that a task names, or None if the task does not name an agent.

    Raise `Invalid` if the agent does not exist, or if the task names both an agent and a role.
    """
    if agent_id is not None and role is not None:
        raise Invalid.at("/agent_role", "not_allowed", "Name an agent or a role, not both.")
    if agent_id is None:
        return None
    agent = agents.find(agent_id.lower())
    if agent is None:
        raise Invalid.at(
            "/agent_id", "unknown_reference", "There is no agent with this id.", problem="unknown_reference"
        )
    return agent


def check_reviewer(agents: Agents, policy: ReviewPolicy | None, author_id: str | None) -> None:
    """Raise `Invalid` if the reviewer in a policy does not exist, or is the agent whose work is reviewed."""
    if policy is None or policy.reviewer_agent_id is None:
        return
    reviewer, pointer = policy.reviewer_agent_id.lower(), "/review_policy/reviewer_agent_id"
    if agents.find(reviewer) is None:
        raise Invalid.at(pointer, "unknown_reference", "There is no agent with this id.", problem="unknown_reference")
    if reviewer == author_id:
        raise Invalid.at(pointer, "not_allowed", "An agent cannot review its own work.")


def has_open_dependency(ids: Sequence[str]) -> bool:
    """Return whether any dependency has not been completed yet.

    Raise `Invalid` if a dependency does not exist, has failed or is cancelled.
    """
    faults, is_open = [], False
    for index, needed in sorted(enumerate(ids), key=lambda pair: pair[1]):
        found = _STATUS_OF_DEPENDENCY.one({"id": needed.lower()})
        if found is None:
            faults.append(FieldError(f"/depends_on/{index}", "unknown_reference", "There is no task with this id."))
        elif found[0] in ("failed", "cancelled"):
            faults.append(
                FieldError(f"/depends_on/{index}", "not_allowed", f"This task is {found[0]} and will not be completed.")
            )
        else:
            is_open = is_open or found[0] != "completed"
    if faults:
        code = "unknown_reference" if all(fault.code == "unknown_reference" for fault in faults) else None
        raise Invalid(
            "Some dependencies do not exist or will never be completed.",
            code=code,
            errors=faults,
        )
    return is_open


def add_dependencies(task_id: str, needed: Sequence[str]) -> None:
    """Record that the task depends on each task in `needed`."""
    for each in needed:
        _ADD_DEPENDENCY.run({"task": task_id, "needs": each})


# -- creation

_JSON = rows.json_column_names(Task)
_row_values = operator.itemgetter(*TaskRow.__struct_fields__)
_INITIAL: dict[str, Any] = {
    field.name: _encode(field.default).decode() if isinstance(field, JSONField) and not field.null else field.default
    for field in Task._meta.sorted_fields
}
"""The initial values of a task's columns, which apply to all columns that are not set when the task is created."""


def _sql_literal(value: Any) -> SQL:
    return SQL(str(value) if isinstance(value, int) else f"'{value}'")


@functools.lru_cache(maxsize=512)
def _insert_statement(names: tuple[str, ...]) -> Statement:
    """Return a statement that inserts a task and takes the values of the named columns as parameters.

    The initial values of the other columns are literals in the statement. This saves time, because binding a value
    takes as long as storing it.
    """
    initial = {name: _sql_literal(value) for name, value in _INITIAL.items() if value is not None and name not in names}

    def build(p: Parameter) -> Any:
        values = {**initial, **{name: p(name) for name in names}}
        return Task.insert({getattr(Task, name): value for name, value in values.items()})

    return Statement(build)


def _insert_task(values: dict[str, Any]) -> dict[str, Any]:
    """Insert a task with the given column values. Return all columns of the new row."""
    given = {name: value for name, value in values.items() if value != _INITIAL[name]}
    _insert_statement(tuple(given)).run(given)
    return {**_INITIAL, **given}


class TaskCreation:
    """Creates tasks. Every method runs in the caller's unit of work."""

    code_reviews: CodeReviews | None
    cost: Costs | None
    tools: Tools | None

    def __init__(self, transitions: TaskTransitions) -> None:
        self._settings, self._agents, self._workers = transitions.settings, transitions.agents, transitions.workers
        self._far_from_quota: dict[str, float] = {}

    def create(self, new: NewTask, *, by: Principal, source: dict[str, Any] | None, origin: Origin) -> Encoded:
        """Validate and insert a task, and return the encoded `TaskView` with its warnings.

        Raise `Invalid` for unacceptable values, and `TooMany` if the caller has too many open tasks.
        """
        self._check_quota(by)
        fields = msgspec.structs.asdict(new)
        fields["title"], fields["tags"] = checked_title(new.title), checked_tags(new.tags)
        fields["deadline"] = new.deadline and future_instant(new.deadline, "/deadline")
        agent = find_named_agent(self._agents, new.agent_id, new.agent_role)
        reviews = self.code_reviews is not None
        check_limits(fields, enforces_budgets=self.cost is not None, performs_reviews=reviews)
        if new.review_policy is not None:
            check_reviewer(self._agents, new.review_policy, None if agent is None else agent.id)
        # Locked, because its children are counted.
        parent_id = origin.parent_task_id or by.task_id
        parent = rows.lock_task(parent_id) if parent_id is not None else None
        extra = _inherited_fields(origin, parent)
        if parent is not None:
            _limit_tools_to_parent(fields, parent)
            _limit_cost_to_parent(fields, parent)
        values = self._columns(new, fields, source or _default_source(by)) | {
            "max_attempts": declared.max_attempts(self._settings, agent, given_members(new.retry_policy)),
            "created_by": by.user_id,
            "parent_task_id": parent and parent.id,
            "workflow_run_id": origin.workflow_run_id,
            "extra": _extra_json(fields, extra),
        }
        if new.depends_on and has_open_dependency(new.depends_on):
            values["status"] = "blocked"
        else:
            values |= queue_columns(
                key=values["queue_key"],
                priority=values["priority"],
                queue_timeout=new.queue_timeout_seconds,
                available_at=values["available_at"],
                now=values["created_at"],
            )
        columns = _insert_task(values)
        row = TaskRow(*_row_values(columns))
        if new.depends_on:
            add_dependencies(row.id, list(dict.fromkeys(each.lower() for each in new.depends_on)))
        add_tags(row.id, row.created_at, fields["tags"])
        statistics.count_transition(None, row.status, row.priority, row.created_by)
        publish_task_event(TaskCreated, row, None)
        warnings = [] if agent is None else self._warnings(agent, new.required_tools)
        body = rows.encode_task(columns, full=True, warnings=warnings)
        return Encoded(body, row.id, 1)

    def _warnings(self, agent: AgentFacts, required: Sequence[str]) -> list[str]:
        """Return the warnings about the agent, and one for each of its tools that is missing on at least one worker.

        Only the workers that may claim the task are checked.
        """
        warnings = agent_warnings(agent, required)
        if agent.enabled_tools:
            found = find_missing_tools(agent, self._workers, self.tools, required=required)
            warnings += [f"tool_not_offered:{tool}" for tool in found]
        return warnings

    def _columns(self, new: NewTask, fields: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
        """Return the column values of a new pending task.

        The values come from the request `new`, the validated `fields`, and the `source`, which identifies the creator
        of the task.
        """
        now = clock.now()
        return {
            "id": new_id(),
            "status": "pending",
            "priority": PRIORITIES.index(new.priority),
            "rank": PRIORITIES.index(new.priority),
            "queue_key": queue_key(new.agent_id and new.agent_id.lower(), new.agent_role, new.required_tools),
            "deadline_key": fields["deadline"] or NO_DEADLINE,
            "created_at": now,
            "updated_at": now,
            "title": fields["title"],
            "description": new.description,
            "instructions": new.instructions,
            "agent_id": new.agent_id and new.agent_id.lower(),
            "agent_role": new.agent_role,
            "available_at": now if new.available_at is None else clock.from_datetime(new.available_at),
            "timeout_seconds": new.timeout_seconds or self._settings.get(declared.TIMEOUT_SECONDS),
            "source_type": source["type"],
            "source_id": source.get("id"),
            "input": rows.to_json_text(new.input),
            "required_tools": rows.to_json_text(new.required_tools),
            "tags": rows.to_json_text(fields["tags"]),
            "metadata": rows.to_json_text(new.metadata),
        }

    def _check_quota(self, by: Principal) -> None:
        """Raise `TooMany` if the caller has reached the quota for open tasks.

        While a caller is far below the quota, the count is read at most once per second. Near the quota, it is read on
        every call.
        """
        if by.user_id is None or self._far_from_quota.get(by.user_id, 0.0) > time.monotonic():
            return
        most = self._settings.get(declared.MAX_OPEN)
        count = statistics.count_open_tasks(by.user_id)
        if count >= most:
            raise TooMany(
                f"You already have {most} unfinished tasks, which is the maximum; wait until some of them have ended.",
                code="quota_exceeded",
            )
        if len(self._far_from_quota) > CACHED_PEOPLE:
            self._far_from_quota.clear()
        if count + CREATED_IN_A_SECOND < most:
            self._far_from_quota[by.user_id] = time.monotonic() + 1


_OWNED_EXTRA = EXTRA_DEFAULTS.keys() & set(NewTask.__struct_fields__)


def _extra_json(fields: Mapping[str, Any], inherited: Mapping[str, Any]) -> str:
    """Return the rarely set fields as JSON text, without fields that have their default value."""
    given = {name: fields[name] for name in _OWNED_EXTRA if fields[name] != EXTRA_DEFAULTS[name]}
    if not given and not inherited:
        return "{}"
    if "depends_on" in given:
        given["depends_on"] = [each.lower() for each in given["depends_on"]]
    return rows.to_json_text({**given, **inherited})


def _inherited_fields(origin: Origin, parent: TaskRow | None) -> dict[str, Any]:
    """Return the fields that a task inherits from its parent or its origin, such as depth, causes and taint."""
    extra: dict[str, Any] = {}
    if origin.cause_chain:
        extra["cause_chain"] = list(origin.cause_chain)
    if origin.step_run_id is not None:
        extra["step_run_id"] = origin.step_run_id
    if origin.tainted:
        extra |= {"tainted": True, "taint_sources": list(origin.taint_sources)}
    if parent is None:
        return extra
    depth = parent.get("depth")
    if depth >= MAX_DEPTH:
        raise Invalid(f"Tasks can be delegated at most {MAX_DEPTH} levels deep.")
    if len(_CHILDREN.rows({"id": parent.id})) >= MAX_CHILDREN:
        raise Invalid(f"A task can delegate at most {MAX_CHILDREN} tasks.")
    extra = {"cause_chain": [*parent.get("cause_chain"), parent.id], **extra, "depth": depth + 1}
    if parent.get("tainted"):
        extra |= {"tainted": True, "taint_sources": [f"task:{parent.id}"]}
    return extra


def _limit_tools_to_parent(fields: dict[str, Any], parent: TaskRow) -> None:
    """Limit the tools of a delegated task to those that its parent allows."""
    allowed, tools = parent.get("allowed_tools"), fields["allowed_tools"]
    if allowed is not None:
        fields["allowed_tools"] = (
            allowed if tools is None else [tool for tool in tools if includes_tools(allowed, [tool])]
        )


def _limit_cost_to_parent(fields: dict[str, Any], parent: TaskRow) -> None:
    """Limit the cost of a delegated task to the unspent part of its parent's cost limit."""
    limit = parent.get("max_cost_usd")
    if limit is not None:
        remaining = max(0.0, round(limit - parent.cost_micro / 1e6, 6))
        own = fields["max_cost_usd"]
        fields["max_cost_usd"] = remaining if own is None else min(own, remaining)


def _default_source(by: Principal) -> dict[str, Any]:
    if by.kind == "agent":
        return {"type": "agent", "id": by.agent_id}
    return {"type": "api" if by.kind == "api_key" else "user", "id": by.user_id}
