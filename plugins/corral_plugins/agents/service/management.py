"""Lists, creates, reads, changes, copies and deletes agents."""

from __future__ import annotations

import functools
import operator
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.unit import after_commit
from corral.errors import Conflict, Invalid, Problem
from corral.events.event import emit
from corral.http.answers import ANY_VERSION, IfMatch
from corral.http.page import Order, Page, newest_first, paginate
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Setting, Settings
from corral_plugins.agents.api import AgentCreated, AgentDeleted, AgentUpdated
from corral_plugins.agents.models import LIVING, Agent, AgentToken
from corral_plugins.agents.service.configuration_conversion import (
    CONFIGURATION,
    COPIED,
    FIELD_OF,
    MAX_STEPS,
    default_config,
    refuse_loosened_tool_policy,
    to_columns,
    usd_of,
)
from corral_plugins.agents.service.rows import (
    TRIES,
    AgentViews,
    add_version,
    contention_error,
    find_readable_agent,
    find_writable_agent,
    has_leases,
    is_state_unchanged,
    update_if_unchanged,
)
from corral_plugins.agents.service.states import StateChangePublisher, suppress_state_changes
from corral_plugins.agents.shapes import (
    AgentBudget,
    AgentBudgetChange,
    AgentFields,
    AgentPatch,
    AgentQuery,
    AgentView,
    NewAgent,
)
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.cost.api import Costs
from corral_plugins.llm.api import LLM
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Tools
from corral_plugins.workers.api import Workers

MAX_AGENTS: Setting[int] = Setting(
    name="agents.max_agents", kind=int, default=1000, minimum=1, maximum=10_000, title="Maximum number of agents"
)


class AgentManagement:
    """Lists and changes agents. Every method runs in the caller's unit of work."""

    code_reviews: CodeReviews | None
    cost: Costs | None
    llm: LLM | None
    tasks: Tasks | None
    tools: Tools | None
    workers: Workers | None

    def __init__(
        self, settings: Settings, views: AgentViews, changes: StateChangePublisher, credentials: Credentials
    ) -> None:
        self._settings, self._views, self._changes, self._credentials = settings, views, changes, credentials

    # -- reading

    def get(self, agent_id: str, *, by: Principal) -> AgentView:
        """Return one agent. Raise `NotFound` if no such agent is visible to the caller."""
        return self._views.view_of(find_readable_agent(agent_id, by))

    def list(self, query: AgentQuery, *, by: Principal) -> Page[AgentView]:
        """Return a page of the agents that match every filter. Deleted agents are excluded."""
        where = Agent.select().where(LIVING & visible(Agent, by), *_filter_conditions(query))
        orders = {
            "created": newest_first(Agent),
            "name": (Order(Agent.name_key, descending=False), Order(Agent.id, descending=False)),
            "last_active": (Order(Agent.last_active_at), Order(Agent.id)),
        }
        page = paginate(where, query, by, scope="agents", order=orders[query.sort], make=_unchanged)
        return Page(
            items=self._views.views_of(page.items),
            total=page.total,
            limit=page.limit,
            offset=page.offset,
            next=page.next,
        )

    # -- writing

    def create(self, new: NewAgent, *, by: Principal) -> AgentView:
        """Create an agent in the state `offline`.

        Raises a `Problem` with the code `duplicate` if the name is taken, `unknown_reference` if a provider or worker
        does not exist, or `quota_exceeded` if there are too many agents.
        """
        config = default_config(self._settings.get(MAX_STEPS))
        values = {"config": config, **self._columns_of(new, config)}
        self._check_references(values)
        return self._insert_agent(new.name, values, by)

    def clone(self, agent_id: str, name: str, *, by: Principal) -> AgentView:
        """Copy an agent without its memories and tokens. The copy is `offline`, and the caller owns it."""
        source = find_readable_agent(agent_id, by)
        return self._insert_agent(name, {column: getattr(source, column) for column in COPIED}, by)

    def update(self, agent_id: str, patch: AgentPatch, match: IfMatch = ANY_VERSION, *, by: Principal) -> AgentView:
        """Change an agent. A change to the configuration creates a new version.

        Raises a `Problem` with the code `duplicate` if the new name is taken, or `unknown_reference` if a provider or
        worker does not exist.
        """
        for _ in range(TRIES):
            row = find_writable_agent(agent_id, by)
            match.check(row.version)
            changes = self._changed_columns(row, patch, by)
            if not changes or self._write_changes(row, changes, by):
                return self._views.view_of(row)
        raise contention_error()

    def delete(self, agent_id: str, match: IfMatch = ANY_VERSION, *, force: bool, by: Principal) -> int:
        """Delete an agent. Return the number of tasks that were cancelled or detached from the agent.

        If the agent has live leases and `force` is set, the tasks of these leases are cancelled. Raise `Conflict` with
        the code `agent_busy` if there are live leases and `force` is not set.
        """
        affected = 0
        for _ in range(TRIES):
            row = find_writable_agent(agent_id, by)
            match.check(row.version)
            affected += self._release_tasks(agent_id, force=force)
            left = Agent.get_by_id(agent_id)
            if has_leases(self.tasks, agent_id):  # the agent claimed a task in the meantime
                continue
            gone = {"deleted_at": clock.now(), "status": "offline", "status_reason": None, "active_tasks": 0}
            if update_if_unchanged(row, gone, is_state_unchanged(left)):
                self._changes.publish_change(row.id, row.name, row.created_by, left.status, "offline", "deleted")
                emit(AgentDeleted(agent_id=row.id, name=row.name), object=("agent", row.id), owner=row.created_by)
                self._end_tokens(agent_id)
                if self.cost is not None:
                    self.cost.set_agent_limit(agent_id, None)
                return affected
        raise contention_error()

    def detach_tasks(self, agent_id: str) -> int:
        """Detach a deleted agent from the tasks that wait for it. Return the number of detached tasks.

        If more than one batch of tasks waits for the agent, a background job detaches the remaining tasks.
        """
        detached = self.tasks.detach_agent(agent_id) if self.tasks is not None else 0
        if detached:
            enqueue("agents.detach", agent_id=agent_id)
        return detached

    # -- budget

    def get_budget(self, agent_id: str, *, by: Principal) -> AgentBudget:
        """Return the agent's cost limits, and the amounts that it has spent and reserved in the current month."""
        return self._budget_of(find_readable_agent(agent_id, by))

    def change_budget(
        self, agent_id: str, change: AgentBudgetChange, match: IfMatch = ANY_VERSION, *, by: Principal
    ) -> AgentBudget:
        """Change the agent's cost limits, which creates a new version of its configuration."""
        limits = AgentPatch(
            monthly_budget_usd=change.monthly_budget_usd, max_cost_per_task_usd=change.max_cost_per_task_usd
        )
        self.update(agent_id, limits, match, by=by)
        return self._budget_of(find_readable_agent(agent_id, by))

    def _budget_of(self, row: Agent) -> AgentBudget:
        budget = self.cost.agent_budgets([row.id]).get(row.id) if self.cost is not None else None
        spent = self.cost.spent_by_agents([row.id])[row.id] if self.cost is not None and budget is None else None
        used = budget.spent if budget is not None else spent
        left = None if budget is None else budget.limit - budget.spent - budget.reserved
        return AgentBudget(
            version=row.version,
            monthly_budget_usd=usd_of(row.monthly_budget_micro),
            max_cost_per_task_usd=usd_of(row.max_cost_per_task_micro),
            spent_usd=usd_of(used),
            reserved_usd=None if budget is None else usd_of(budget.reserved),
            remaining_usd=usd_of(left),
        )

    def _apply_budget(self, row: Agent) -> None:
        if self.cost is not None:
            self.cost.set_agent_limit(row.id, row.monthly_budget_micro)

    # -- parts

    def _insert_agent(self, name: str, values: dict[str, Any], by: Principal) -> AgentView:
        self._check_tools(None, values, by)
        limit = self._settings.get(MAX_AGENTS)
        if Agent.select().where(LIVING).count() >= limit:
            raise Problem(
                f"The limit of {limit} agents (agents.max_agents) is reached; delete an agent first.",
                code="quota_exceeded",
            )
        now = clock.now()
        row = Agent(
            **values,
            **_name_columns(name),
            id=new_id(),
            stamp=new_id(),
            created_by=by.user_id,
            created_at=now,
            updated_at=now,
        )
        Agent.insert(row.__data__).on_conflict_ignore().execute()
        if not Agent.select(Agent.id).where(Agent.id == row.id).exists():
            raise _name_taken_error(row.name, row.name_key)
        add_version(row, sorted(CONFIGURATION), by)
        self._apply_budget(row)
        emit(
            AgentCreated(agent_id=row.id, name=row.name, role=row.role), object=("agent", row.id), owner=row.created_by
        )
        return self._views.view_of(row)

    def _changed_columns(self, row: Agent, patch: AgentPatch, by: Principal) -> dict[str, Any]:
        """Check a patch, and return the columns whose values change."""
        wanted = self._columns_of(patch, row.config)
        if patch.name is not UNSET:
            wanted.update(_name_columns(patch.name))
        changes = {column: value for column, value in wanted.items() if getattr(row, column) != value}
        if (changes.get("review_policy") or {}).get("reviewer_agent_id") == row.id:
            detail = "An agent cannot review its own work."
            raise Invalid.at("/review_policy/reviewer_agent_id", "not_allowed", detail)
        self._check_references(changes)
        self._check_tools(row, changes, by)
        if "name_key" in changes and _agent_with_name(changes["name_key"]) is not None:
            raise _name_taken_error(changes["name"], changes["name_key"])
        return changes

    def _write_changes(self, row: Agent, changes: dict[str, Any], by: Principal) -> bool:
        """Save changes to an agent, emit the `agent.updated` event, and update `row` to match.

        If the configuration changed, store a new version. Return False if the stored row has changed since `row` was
        read.
        """
        fields = sorted({FIELD_OF.get(column, column) for column in changes} - {"name_key"})
        reconfigured = [field for field in fields if field in CONFIGURATION]
        values = {**changes, "stamp": new_id(), "config_version": row.config_version + bool(reconfigured)}
        try:
            if not update_if_unchanged(row, values):
                return False
        except peewee.IntegrityError:  # another agent took the name in the meantime
            raise Conflict(f"Another agent already has the name {changes.get('name')!r}.", code="duplicate") from None
        for column, value in values.items():
            setattr(row, column, value)
        row.version, row.updated_at = row.version + 1, clock.now()
        if reconfigured:
            add_version(row, reconfigured, by)
        if "monthly_budget_micro" in changes:
            self._apply_budget(row)
        event = AgentUpdated(agent_id=row.id, version=row.config_version, changed_fields=fields)
        emit(event, object=("agent", row.id), owner=row.created_by)
        return True

    def _check_tools(self, row: Agent | None, values: dict[str, Any], by: Principal) -> None:
        """Raise `Forbidden` if the change adds tools or tool rules that the caller may not grant."""
        had: list[str] = row.enabled_tools if row is not None else []
        before: dict[str, Any] = row.tool_policy if row is not None else {}
        after: dict[str, Any] = values.get("tool_policy", before)
        refuse_loosened_tool_policy(before, after, manages=_may_manage(by))
        added = [tool for tool in values.get("enabled_tools", []) if tool not in had]
        if self.tools is not None and (added or after != before):
            self.tools.refuse_missing_permissions(by, enabled=added, policy=after, before=before)

    def _columns_of(self, fields: AgentFields, config: dict[str, Any]) -> dict[str, Any]:
        """Return the column values for the fields that are set.

        Raise `Invalid` for values that would have no effect because a plugin that they require is not active.
        """
        budgets, reviews = self.cost is not None, self.code_reviews is not None
        return to_columns(fields, config, enforces_budgets=budgets, performs_reviews=reviews)

    def _check_references(self, values: dict[str, Any]) -> None:
        """Raise `Invalid` with the code `unknown_reference` if a provider, worker or reviewer does not exist."""
        reviewer = (values.get("review_policy") or {}).get("reviewer_agent_id")
        if reviewer is not None and not Agent.select().where((Agent.id == reviewer) & LIVING).exists():
            raise _unknown_reference("/review_policy/reviewer_agent_id", "No agent has this id.")
        worker, provider = values.get("worker_id"), values.get("llm_provider")
        if worker is not None and (self.workers is None or self.workers.find(worker) is None):
            raise _unknown_reference("/worker_id", "No worker has this id.")
        if provider is not None and self.llm is not None and not self.llm.is_known(provider):
            raise _unknown_reference(
                "/llm_provider", "No provider has this name; `corral api GET /llm/providers` lists them."
            )

    def _release_tasks(self, agent_id: str, *, force: bool) -> int:
        """End the leases of the agent, and detach it from the tasks that wait for it.

        Return the number of cancelled and detached tasks. Raise `Conflict` with the code `agent_busy` if there are
        live leases and `force` is not set.
        """
        if self.tasks is None:
            return 0
        live = self.tasks.leased_task_ids([agent_id]).get(agent_id, [])
        if live and not force:
            raise Conflict(
                "Workers hold leases for tasks of this agent; stop the agent first, or delete it with force=true.",
                code="agent_busy",
                task_ids=live,
            )
        with suppress_state_changes(agent_id):
            cancelled = (
                self.tasks.release_leases_of_agent(agent_id, cancel=True, reason="agent_deleted") if live else []
            )
        return len(cancelled) + self.detach_tasks(agent_id)

    def _end_tokens(self, agent_id: str) -> None:
        AgentToken.delete().where(AgentToken.agent_id == agent_id).execute()
        after_commit(lambda: self._credentials.forget(lambda caller: caller.agent_id == agent_id))


def _unchanged(row: Agent) -> Agent:
    return row


def _may_manage(by: Principal) -> bool:
    return by.kind == "system" or by.may("agents.manage")


def _name_columns(name: str) -> dict[str, str]:
    clean = name.strip()
    if not clean:
        raise Invalid.at("/name", "too_short", "must contain a character other than white space")
    return {"name": clean, "name_key": clean.casefold()}


def _agent_with_name(name_key: str) -> str | None:
    row = Agent.select(Agent.id).where((Agent.name_key == name_key) & LIVING).tuples().first()
    return None if row is None else str(row[0])


def _name_taken_error(name: str, name_key: str) -> Conflict:
    return Conflict(
        f"Another agent already has the name {name!r}.", code="duplicate", existing_id=_agent_with_name(name_key)
    )


def _unknown_reference(pointer: str, detail: str) -> Invalid:
    return Invalid.at(pointer, "unknown_reference", detail, problem="unknown_reference")


def _filter_conditions(query: AgentQuery) -> list[Any]:
    found: list[Any] = []
    states = [state for given in (query.status_filter, query.status) if given is not UNSET for state in given]
    if states:
        found.append(Agent.status.in_(states))
    if query.role is not UNSET:
        found.append(Agent.role.in_(query.role))
    if query.worker_id is not UNSET:
        found.append(Agent.worker_id.in_([worker.lower() for worker in query.worker_id]))
    if query.search is not UNSET:
        found.append(Agent.name_key.contains(query.search.casefold()) | Agent.description.contains(query.search))
    if query.tag is not UNSET:
        tagged = [_has_tag(tag) for tag in query.tag]
        found.append(functools.reduce(operator.or_, tagged))
    return found


def _has_tag(tag: str) -> Any:
    """Return an SQL condition that selects the agents with this tag.

    The condition removes the JSON text of the tag from the `tags` column, and compares the result with the original
    value. They differ only if the agent has the tag. This works on both database engines.
    """
    quoted = peewee.Value(msgspec.json.encode(tag).decode(), converter=False)
    return peewee.fn.REPLACE(Agent.tags, quoted, "") != Agent.tags
