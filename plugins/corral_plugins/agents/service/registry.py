"""The `Agents` service: looks up agents for other plugins, selects those that may claim tasks, and assigns slots.

Every task claim and every model call uses this service, so its code is performance-critical.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.statement import Statement
from corral.plugin import Setting, Settings
from corral_plugins.agents.api import AgentFacts
from corral_plugins.agents.models import LIVING, Agent
from corral_plugins.agents.service.states import (
    ERROR_AFTER_FAILURES,
    PAUSE_AFTER_STALLS,
    StateChangePublisher,
    are_state_changes_suppressed,
)

CLAIMING = ("idle", "busy")
CACHE_BYTES, TYPICAL_BYTES = 64_000_000, 2_000
BATCH_SIZE = 500

_STATE = (Agent.id, Agent.stamp, Agent.status, Agent.status_reason, Agent.active_tasks, Agent.last_active_at)
_BY_ID = Statement(lambda p: Agent.select(*_STATE).where((Agent.id == p("id")) & LIVING).tuples())
_ELIGIBLE = Statement(
    lambda p: (
        Agent.select(*_STATE)
        .where(
            Agent.status.in_(CLAIMING)
            & (Agent.active_tasks < Agent.max_concurrent_tasks)
            & (Agent.worker_id.is_null() | (Agent.worker_id == p("worker_id")))
            & (Agent.worker_group.is_null() | (Agent.worker_group == p("group")))
            & LIVING
        )
        .order_by(Agent.active_tasks, Agent.last_active_at)
        .tuples()
    )
)
_EVENT_FIELDS = (Agent.active_tasks, Agent.status, Agent.name, Agent.created_by)
_TAKE_SLOT = Statement(
    lambda p: (
        Agent.update({Agent.active_tasks: Agent.active_tasks + 1, Agent.status: "busy", Agent.last_active_at: p("now")})
        .where(
            (Agent.id == p("id"))
            & Agent.status.in_(CLAIMING)
            & (Agent.active_tasks < Agent.max_concurrent_tasks)
            & LIVING
        )
        .returning(*_EVENT_FIELDS)
    )
)
_AFTER_LAST = peewee.Case(
    None,
    (
        ((Agent.active_tasks <= 1) & (Agent.status == "busy"), "idle"),
        ((Agent.active_tasks <= 1) & (Agent.status == "draining"), "offline"),
    ),
    Agent.status,
)
_RELEASE = Statement(
    lambda p: (
        Agent.update(
            {Agent.active_tasks: Agent.active_tasks - 1, Agent.status: _AFTER_LAST, Agent.last_active_at: p("now")}
        )
        .where((Agent.id == p("id")) & (Agent.active_tasks > 0) & LIVING)
        .returning(*_EVENT_FIELDS)
    )
)
_FREE_SLOT = Statement(
    lambda p: Agent.update({Agent.active_tasks: Agent.active_tasks - 1, Agent.last_active_at: p("now")}).where(
        (Agent.id == p("id")) & (Agent.active_tasks > 0) & LIVING
    )
)


_PAUSE = Statement(
    lambda p: (
        Agent.update({Agent.status: "paused", Agent.status_reason: p("reason")})
        .where((Agent.id == p("id")) & (Agent.status == p("before")) & LIVING)
        .returning(*_EVENT_FIELDS)
    )
)
_RESUME = Statement(
    lambda p: (
        Agent.update(
            {
                Agent.status: peewee.Case(None, ((Agent.active_tasks > 0, "busy"),), "idle"),
                Agent.status_reason: None,
            }
        )
        .where((Agent.id == p("id")) & (Agent.status == "paused") & (Agent.status_reason == p("reason")) & LIVING)
        .returning(*_EVENT_FIELDS)
    )
)


def _increment_statement(counter: Any) -> Statement:
    return Statement(
        lambda p: (
            Agent.update({counter: counter + 1})
            .where((Agent.id == p("id")) & LIVING)
            .returning(counter, *_EVENT_FIELDS)
        )
    )


def _reset_statement(*counters: Any) -> Statement:
    is_counting = functools.reduce(operator.or_, [counter > 0 for counter in counters])
    return Statement(lambda p: Agent.update(dict.fromkeys(counters, 0)).where((Agent.id == p("id")) & is_counting))


_COUNT_FAILURE, _RESET_FAILURES = (
    _increment_statement(Agent.failures_in_a_row),
    _reset_statement(Agent.failures_in_a_row),
)
_COUNT_STALL, _RESET_STALLS = _increment_statement(Agent.stalls_in_a_row), _reset_statement(Agent.stalls_in_a_row)
_RESET_BOTH = _reset_statement(Agent.failures_in_a_row, Agent.stalls_in_a_row)
_ROLE = Statement(lambda p: Agent.select(Agent.id).where((Agent.role == p("role")) & LIVING).limit(1).tuples())


class AgentsService:
    """Finds agents that may claim tasks, and assigns slots to tasks. Implements `corral_plugins.agents.api.Agents`."""

    def __init__(self, settings: Settings, changes: StateChangePublisher) -> None:
        self._settings, self._changes = settings, changes
        self._cache: dict[str, AgentFacts] = {}  # by stamp; never stale, because a stamp is never reused
        self._bytes = 0

    def find(self, agent_id: str) -> AgentFacts | None:
        """Return the agent, or None if it does not exist or is deleted.

        The caller must not change the lists and dicts in the returned object, because the cache shares them with other
        callers.
        """
        row = _BY_ID.one({"id": agent_id})
        return next(iter(self._facts_of_rows([row])), None) if row is not None else None

    def find_many(self, agent_ids: Sequence[str]) -> dict[str, AgentFacts]:
        """Return the agents with these ids, keyed by id. Deleted agents are omitted from the result."""
        if not agent_ids:
            return {}
        query: Any = Agent.select(*_STATE).where(Agent.id.in_(list(set(agent_ids))) & LIVING).tuples()
        return {facts.id: facts for facts in self._facts_of_rows(list(query))}

    def eligible_agents(
        self, *, worker_id: str, group: str | None, labels: dict[str, str], agent_ids: Sequence[str] | None
    ) -> list[AgentFacts]:
        """Return the agents that this worker may run now, sorted by number of leases and then by idle time.

        The agents with the fewest leases come first and, among these, the agents that have been idle the longest.
        """
        rows: Iterable[tuple[Any, ...]] = _ELIGIBLE.rows({"worker_id": worker_id, "group": group})
        if agent_ids is not None:
            wanted = set(agent_ids)
            rows = [row for row in rows if row[0] in wanted]
        offered = labels.items()
        return [facts for facts in self._facts_of_rows(list(rows)) if facts.worker_labels.items() <= offered]

    def started_agents(self, role: str | None) -> list[AgentFacts]:
        """Return the agents with the state `idle` or `busy` that have this role, or any role if `role` is None."""
        of_role = Agent.role == role if role is not None else Agent.role.is_null(False)
        query: Any = Agent.select(*_STATE).where(Agent.status.in_(CLAIMING) & of_role & LIVING).tuples()
        return list(self._facts_of_rows(list(query)))

    def agents_using_provider(self, provider: str) -> list[str]:
        named = Agent.select(Agent.id).where((Agent.llm_provider == provider) & LIVING).order_by(Agent.id).limit(50)
        return [row.id for row in named]

    def has_role(self, role: str) -> bool:
        """Return whether an agent with this role exists and is not deleted."""
        return _ROLE.one({"role": role}) is not None

    def take_slot(self, agent_id: str, *, cause: tuple[str, ...] = ()) -> bool:
        """Occupy one of the agent's slots for concurrent tasks. Return False if no slot is free."""
        rows = _TAKE_SLOT.rows({"id": agent_id, "now": clock.now()})
        for active, status, name, owner in rows:
            if active == 1:
                self._changes.publish_change(agent_id, name, owner, "idle", status, None, cause)
        return bool(rows)

    def release_slot(self, agent_id: str, *, cause: tuple[str, ...] = ()) -> None:
        """Release a slot of the agent. If it was the last one, change `busy` to `idle`, or `draining` to `offline`."""
        if are_state_changes_suppressed(agent_id):
            _FREE_SLOT.run({"id": agent_id, "now": clock.now()})
            return
        for active, status, name, owner in _RELEASE.rows({"id": agent_id, "now": clock.now()}):
            before = {"idle": "busy", "offline": "draining"}.get(status) if active == 0 else None
            if before is not None:
                self._changes.publish_change(agent_id, name, owner, before, status, None, cause)

    def find_paused(self, reason: str) -> list[str]:
        paused = (Agent.status == "paused") & (Agent.status_reason == reason) & LIVING
        return [row.id for row in Agent.select(Agent.id).where(paused).order_by(Agent.id).limit(BATCH_SIZE)]

    def pause_automatically(self, agent_id: str, reason: str) -> None:
        for before in CLAIMING:
            for _, after, name, owner in _PAUSE.rows({"id": agent_id, "before": before, "reason": reason}):
                self._changes.publish_change(agent_id, name, owner, before, after, reason)

    def resume_automatically(self, agent_id: str, reason: str) -> None:
        for _, after, name, owner in _RESUME.rows({"id": agent_id, "reason": reason}):
            self._changes.publish_change(agent_id, name, owner, "paused", after, None)

    def record_attempt_end(
        self, agent_id: str, *, configuration_failure: bool, stalled: bool, cause: tuple[str, ...] = ()
    ) -> None:
        """Record how an attempt ended. Too many consecutive configuration failures change the agent's state to `error`.

        An attempt that ends in any other way resets the count of failures. An attempt that did not stall resets the
        count of stalls.
        """
        if configuration_failure:
            if not stalled:
                _RESET_STALLS.run({"id": agent_id})
            self._suspend_after(ERROR_AFTER_FAILURES, _COUNT_FAILURE, agent_id, "error", "config_error", cause)
        else:
            (_RESET_FAILURES if stalled else _RESET_BOTH).run({"id": agent_id})

    def record_stall(self, agent_id: str, *, cause: tuple[str, ...] = ()) -> None:
        """Count a stalled attempt. After too many consecutive stalls, the agent's state becomes `paused`."""
        self._suspend_after(PAUSE_AFTER_STALLS, _COUNT_STALL, agent_id, "paused", "stalled", cause)

    def _suspend_after(
        self,
        limit: Setting[int],
        count: Statement,
        agent_id: str,
        after: str,
        reason: str,
        cause: tuple[str, ...],
    ) -> None:
        """Count a failure or stall of an agent.

        When the count reaches `limit` and the agent is `idle` or `busy`, change its state to `after`. If the setting
        `limit` is 0, the state never changes.
        """
        most = self._settings.get(limit)
        for incidents, _, before, name, owner in count.rows({"id": agent_id}):
            if most and incidents >= most and before in CLAIMING:
                Agent.update(status=after, status_reason=reason).where(
                    (Agent.id == agent_id) & (Agent.status == before)
                ).execute()
                self._changes.publish_change(agent_id, name, owner, before, after, reason, cause)

    def _facts_of_rows(self, rows: list[tuple[Any, ...]]) -> list[AgentFacts]:
        """Return the facts about the agents in `rows`, which contain the columns in `_STATE`.

        The state of an agent comes from its row. The other facts come from the cache, or from the database if the agent
        is not cached.
        """
        cache = self._cache  # another thread may replace the cache
        missing = [row[0] for row in rows if row[1] not in cache]
        fresh: dict[str, AgentFacts] = {}
        for first in range(0, len(missing), BATCH_SIZE):
            for found in Agent.select().where(Agent.id.in_(missing[first : first + BATCH_SIZE])):
                fresh[found.id] = _facts_of_row(found)
                self._cache_facts(found.stamp, fresh[found.id])
        complete = []
        for agent_id, stamp, status, reason, active, last in rows:
            cached = fresh.get(agent_id) or cache.get(stamp)
            if cached is not None:  # None if the agent was purged between the two reads
                complete.append(
                    msgspec.structs.replace(
                        cached, status=status, status_reason=reason, active_tasks=active, last_active_at=last or None
                    )
                )
        return complete

    def _cache_facts(self, stamp: str, facts: AgentFacts) -> None:
        self._bytes += len(facts.system_prompt) + TYPICAL_BYTES
        if self._bytes > CACHE_BYTES:
            self._cache, self._bytes = {}, 0
        self._cache[stamp] = facts


def _facts_of_row(row: Agent) -> AgentFacts:
    return AgentFacts(
        id=row.id,
        name=row.name,
        role=row.role,
        owner_id=row.created_by or "",
        status=row.status,
        status_reason=row.status_reason,
        version=row.config_version,
        llm_provider=row.llm_provider,
        llm_model=row.llm_model,
        system_prompt=row.system_prompt,
        enabled_tools=row.enabled_tools,
        tool_policy=row.tool_policy,
        worker_id=row.worker_id,
        worker_group=row.worker_group,
        worker_labels=row.worker_labels,
        config=row.config,
        max_concurrent_tasks=row.max_concurrent_tasks,
        active_tasks=row.active_tasks,
        retry_policy=row.retry_policy,
        stall_policy=row.stall_policy,
        last_active_at=row.last_active_at or None,
        max_cost_per_task_micro=row.max_cost_per_task_micro,
        review_policy=row.review_policy,
    )
