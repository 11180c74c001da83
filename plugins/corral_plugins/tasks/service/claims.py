"""Claims, which lease the tasks at the front of the queues to agents and workers.

A claim chooses and leases its tasks in one unit of work. The time that a claim takes does not depend on the number of
queued tasks.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.dialect import execute, json_array_strings, savepoint
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.errors import NotFound
from corral.ids import new_id
from corral_core.accounts.api import Accounts
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts
from corral_plugins.cost.api import BudgetRefused
from corral_plugins.messages.api import NO_MESSAGES, ClaimedMessages, Messages
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import Claim, ClaimResponse, TaskAssigned
from corral_plugins.tasks.models import Attempt, Task, TaskRow
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.agent_models import AgentModels, AgentsWithCallableModel
from corral_plugins.tasks.service.claim_budgets import ClaimBudgets, ClaimPlan, cost_limit_of
from corral_plugins.tasks.service.claim_payloads import ClaimPayloads
from corral_plugins.tasks.service.rows import TASK_COLUMNS
from corral_plugins.tasks.service.transitions import NOT_QUEUED, TaskTransitions, transition
from corral_plugins.tools.api import Tools, includes_tools
from corral_plugins.workers.api import WorkerFacts

# The non-empty queues that require tools. Each costs one lookup in a partial index, however many tasks there are.
_ONE_TOOLED = (
    "(SELECT t.{what} FROM tasks_tasks AS t WHERE t.status = 'pending' AND t.queue IS NOT NULL"
    " AND t.required_tools <> '[]' {which} ORDER BY t.queue LIMIT 1)"
)
_FIRST, _NEXT, _TOOLS = (
    _ONE_TOOLED.format(what=what, which=which)
    for what, which in (
        ("queue", ""),
        ("queue", "AND t.queue > found.queue"),
        ("required_tools", "AND t.queue = found.queue"),
    )
)
_TOOLED = (
    f"WITH RECURSIVE found(queue) AS (SELECT {_FIRST} UNION ALL"  # noqa: S608  (all literals)
    f" SELECT {_NEXT} FROM found WHERE found.queue IS NOT NULL)"
    f" SELECT queue, {_TOOLS} FROM found WHERE queue IS NOT NULL"
)
_ORDER = "rank DESC, deadline_key, available_at, created_at, id"
# Finds the first tasks of many queues with one index lookup for each queue. A `head` is a text of fixed
# width that sorts in claim order and ends with the id of the task; letters sort after digits.
_HEADS = (
    "SELECT q.value, COALESCE((SELECT (9 - rank) || deadline_key || available_at || created_at || id FROM tasks_tasks"  # noqa: S608
    f" WHERE status = 'pending' AND queue = q.value {{others}} ORDER BY {_ORDER} LIMIT 1), 'none') AS head"
    " FROM {queues} ORDER BY head LIMIT ?"
)
_OTHERS = "AND (created_by IS NULL OR created_by NOT IN (SELECT value FROM {users}))"
_NOT_SKIPPED = "AND id NOT IN (SELECT value FROM {ids})"
ID_LENGTH = 36
_COLUMNS = "id, queue, rank, deadline_key, available_at, created_at"

# The cast keeps SQLite from comparing the parameter with the literal in the condition of the index of held tasks. It
# would do that, and plan the statement again, each time that the statement runs.
_TAKE_FREE = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(rows.PENDING & (Task.queue == p("queue").cast("TEXT")))
        .order_by(Task.rank.desc(), Task.deadline_key, Task.available_at, Task.created_at, Task.id)
        .limit(1),
        skip_locked=True,
    ).tuples()
)
_TAKE_THIS = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS).where((Task.id == p("id")) & (Task.status == "pending")), skip_locked=True
    ).tuples()
)


def _queues_with_tools() -> list[tuple[str, str]]:
    """Return the non-empty queues whose tasks require tools, each with the required tools as JSON text."""
    return list(execute(_TOOLED).fetchall())


def worker_has_tools(worker: WorkerFacts, tools: Sequence[str], of_server: Iterable[str]) -> bool:
    """Return whether the worker or the server offers each tool in `tools`. `of_server` lists the server's tools.

    A worker that has not reported its tools is assumed to offer every tool.
    """
    return worker.tools is None or includes_tools([*worker.tools, *of_server], tools)


def queues_for_agents(
    agents: Sequence[AgentFacts], worker: WorkerFacts, service: Tools | None
) -> dict[str, list[AgentFacts]]:
    """Return the queues that these agents may serve on this worker, each with the agents that may serve it.

    The agents of each queue are in the order of `agents`.
    """
    found: dict[str, list[AgentFacts]] = {}
    for agent in agents:
        for base in (f"agent:{agent.id}", f"role:{agent.role}", "any"):
            found.setdefault(base, []).append(agent)
    kinds: dict[tuple[str, ...], int] = {}  # many agents have the same tools, so each set of tools is checked once
    kind_of = {agent.id: kinds.setdefault(tuple(agent.enabled_tools), len(kinds)) for agent in agents}
    queues = _queues_with_tools()
    of_server = service.server_tools() if service is not None and queues else frozenset()
    for queue, text in queues:
        of_base = found.get(queue.partition("#")[0])
        tools = msgspec.json.decode(text) if of_base else []
        if of_base and worker_has_tools(worker, tools, of_server):
            kinds_able = {kind for enabled, kind in kinds.items() if includes_tools(enabled, tools)}
            able = [agent for agent in of_base if kind_of[agent.id] in kinds_able]
            if able:
                found[queue] = able
    return found


def first_task_of_each_queue(
    queues: Iterable[str], *, limit: int, without: Sequence[str] = (), skipped: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return the first task of each queue as `(task id, queue)`, in claim order, up to a total of `limit` tasks.

    Tasks whose requester is in `without`, and tasks in `skipped`, are omitted.
    """
    others, parameters = "", [rows.to_json_text(list(queues)), limit]
    if skipped:
        others = _NOT_SKIPPED.format(ids=json_array_strings("s"))
        parameters = [rows.to_json_text(list(skipped)), *parameters]
    if without:
        others = f"{_OTHERS.format(users=json_array_strings('u'))} {others}"
        parameters = [rows.to_json_text(list(without)), *parameters]
    found = execute(_HEADS.format(queues=json_array_strings("q"), others=others), parameters).fetchall()
    return [(head[-ID_LENGTH:], queue) for queue, head in found if head != "none"]


def lock_queued_task(task_id: str, queue: str, *, exactly: bool) -> TaskRow | None:
    """Lock a queued task and return its row, or None if concurrent claims have taken all suitable tasks.

    If `exactly` is set, lock the task `task_id`. Otherwise, lock the first task of the queue that no concurrent claim
    has locked.
    """
    found = _TAKE_THIS.one({"id": task_id}) if exactly else _TAKE_FREE.one({"queue": queue})
    return None if found is None else TaskRow(*found)


def first_task_ids(names: Iterable[str], *, limit: int) -> list[str]:
    """Return the ids of the first `limit` tasks, in claim order, across the queues in `names`."""
    filled = [queue for _, queue in first_task_of_each_queue(names, limit=limit)]
    if not filled:
        return []
    one = (
        f"SELECT * FROM (SELECT {_COLUMNS} FROM tasks_tasks WHERE status = 'pending' AND queue = ?"  # noqa: S608
        f" ORDER BY {_ORDER} LIMIT ?) AS q"
    )
    sql = f"SELECT id FROM ({' UNION ALL '.join([one] * len(filled))}) AS t ORDER BY {_ORDER} LIMIT ?"  # noqa: S608
    parameters = [value for queue in filled for value in (queue, limit)]
    return [row[0] for row in execute(sql, [*parameters, limit]).fetchall()]


def find_queued_tasks(task_ids: Sequence[str]) -> list[TaskRow]:
    """Return the rows of the given tasks. Tasks that are not in a queue are omitted."""
    query = Task.select(*TASK_COLUMNS).where(Task.id.in_(list(task_ids)) & Task.queue.is_null(False))
    return [TaskRow(*row) for row in Statement(lambda p: query.tuples()).rows({})] if task_ids else []


# -- claims


TRIES = 3
CACHED_PEOPLE = 10_000
TOKEN_PREFIX = "cra_a"  # noqa: S105  (a prefix, not a secret)

_INSERT = Statement(
    lambda p: Attempt.insert(
        {
            field: p(field.name)
            for field in Attempt._meta.sorted_fields
            if field.name not in ("checkpoint", "result", "error")
        }
    )
)
_RUNNING_BY = Statement(
    lambda p: (
        Task.select(Task.created_by, peewee.fn.COUNT(Task.id))
        .where(Task.lease_id.is_null(False))
        .group_by(Task.created_by)
        .tuples()
    )
)
_HOLD = Statement(
    lambda p: Task.update({Task.queue: "held"}).where(
        Task.id.in_(
            Task.select(Task.id)
            .where(
                (Task.created_by == p("user"))
                & (Task.status == "pending")
                & Task.queue.is_null(False)
                & (Task.queue != "held")
            )
            .limit(500)
        )
    )
)


def hash_token(token: str) -> str:
    """Return the hash of an attempt token. The database stores only this hash."""
    return hashlib.sha256(token.encode()).hexdigest()


class _SlotTaken(Exception):
    """Raised if a concurrent claim took the last free slot of the worker or of a chosen agent."""


class TaskClaims:
    """Leases tasks to workers.

    Every claim locks rows in the same order: the tasks, then their agents, then the worker.
    """

    messages: Messages | None
    switch: KillSwitch | None
    tools: Tools | None

    def __init__(
        self,
        transitions: TaskTransitions,
        payloads: ClaimPayloads,
        models: AgentModels,
        budgets: ClaimBudgets,
        accounts: Accounts,
    ) -> None:
        self._transitions, self._payloads, self._models, self._accounts = transitions, payloads, models, accounts
        self._budgets = budgets
        self._settings, self._agents, self._workers = transitions.settings, transitions.agents, transitions.workers
        self._active: dict[str, tuple[bool, float]] = {}

    def claim(
        self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None, tries: int = TRIES
    ) -> ClaimResponse:
        """Lease tasks to a worker. Implements `Tasks.claim`.

        If a concurrent claim takes the last free slot of the worker or of a chosen agent, or uses up a budget, the
        claim is tried again. It is tried at most `tries` times in total. Raise `NotFound` if there is no such worker.
        """
        worker = self._workers.find(worker_id)
        if worker is None:
            raise NotFound("There is no worker with this id.")
        if self._is_kill_switch_engaged():
            return ClaimResponse(tasks=[], reason="kill_switch")
        if worker.status == "draining":
            return ClaimResponse(tasks=[], reason="draining")
        free = worker.max_agents - worker.active_leases
        if not worker.can_claim or free <= 0:
            return ClaimResponse(tasks=[], reason="at_capacity" if worker.can_claim else "none")
        agents, retry_at = self._agents_for(worker, agent_ids)
        if not agents:
            return ClaimResponse(tasks=[], reason="none", retry_at=retry_at)
        claims: list[Claim] = []
        plan = self._budgets.plan(skip_budgets=tries == TRIES)
        try:
            with savepoint():
                claims = self._lease_tasks(worker, self._choose_tasks(worker, agents, min(max_tasks, free), plan))
        except (_SlotTaken, BudgetRefused) as refused:
            plan.has_refused |= isinstance(refused, BudgetRefused)
            if tries > 1:
                return self.claim(worker_id, max_tasks=max_tasks, agent_ids=agent_ids, tries=tries - 1)
        self._budgets.remember_refusal(plan)
        return ClaimResponse(tasks=claims, reason="ok" if claims else plan.reason, retry_at=retry_at)

    def claimable(self, worker_id: str, *, limit: int) -> list[str]:
        """Return the ids of the tasks that a claim would lease now, in claim order.

        These are the first tasks of the queues that the worker may serve, but a task whose attempt would exceed a
        budget is omitted. Raise `NotFound` if there is no such worker.
        """
        worker = self._workers.find(worker_id)
        if worker is None:
            raise NotFound("There is no worker with this id.")
        if not worker.can_claim or self._is_kill_switch_engaged():
            return []
        agents = self._agents_for(worker, None).agents
        if not agents:
            return []
        served_queues = queues_for_agents(agents, worker, self.tools)
        return self._affordable(first_task_ids(served_queues, limit=limit), served_queues)

    def _affordable(self, task_ids: Sequence[str], served_queues: Mapping[str, Sequence[AgentFacts]]) -> list[str]:
        """Return the tasks that the budgets allow to run, in the given order.

        Each task is checked as if all preceding tasks of the result had already been claimed.
        """
        plan, slots = self._budgets.plan(), Counter[str]()
        found = {row.id: row for row in find_queued_tasks(task_ids)}
        affordable = []
        for row in [found[task_id] for task_id in task_ids if task_id in found]:
            agent = self._affordable_agent(row, list(served_queues.get(row.queue or "", ())), slots, plan)
            if agent is not None:
                plan.add(row, agent)
                affordable.append(row.id)
        return affordable

    def _agents_for(self, worker: WorkerFacts, agent_ids: Sequence[str] | None) -> AgentsWithCallableModel:
        """Return the agents that this worker may run now and that have a model the gateway can call."""
        eligible = self._agents.eligible_agents(
            worker_id=worker.id, group=worker.group, labels=worker.labels, agent_ids=agent_ids
        )
        return self._models.with_callable_model(eligible)

    def _is_kill_switch_engaged(self) -> bool:
        return self.switch is not None and self.switch.state().engaged

    # -- choosing

    def _choose_tasks(
        self, worker: WorkerFacts, agents: Sequence[AgentFacts], wanted: int, plan: ClaimPlan
    ) -> list[tuple[TaskRow, AgentFacts, int]]:
        """Choose and assign tasks. Return each task with its agent and the amount to reserve."""
        served_queues = queues_for_agents(agents, worker, self.tools)
        slots = Counter({agent.id: agent.max_concurrent_tasks - agent.active_tasks for agent in agents})
        heavy = self._heavy_requesters()
        chosen: list[tuple[TaskRow, AgentFacts, int]] = []
        skipped: list[str] = []
        tries = 0
        while len(chosen) < wanted and tries < wanted + 8:
            tries += 1
            names = [name for name, each in served_queues.items() if any(slots[agent.id] > 0 for agent in each)]
            found = self._lock_first_task(names, heavy, skipped)
            if found is None:
                break
            row, queue = found
            if not self._is_requester_active(row.created_by):
                _HOLD.run({"user": row.created_by})
                continue
            able = [each for each in served_queues[queue] if slots[each.id] > 0]
            agent = self._affordable_agent(row, able, slots, plan)
            if agent is None:
                skipped.append(row.id)
                continue
            transition(row, "assigned", event=TaskAssigned, **self._assignment_columns(row, worker, agent))
            slots[agent.id] -= 1
            chosen.append((row, agent, plan.add(row, agent)))
        return chosen

    @staticmethod
    def _affordable_agent(
        row: TaskRow, able: list[AgentFacts], slots: Counter[str], plan: ClaimPlan
    ) -> AgentFacts | None:
        """Return the agent with the fewest leases among those whose budgets allow an attempt.

        Return None if there is no such agent. An agent whose budget is used up gets no more tasks in this claim.
        """
        for agent in sorted(able, key=lambda each: each.max_concurrent_tasks - slots[each.id]):
            if plan.find_obstacle(row, agent) is None:
                return agent
            plan.has_refused = True
            if plan.is_used_up(agent):
                slots[agent.id] = 0
        return None

    def _lock_first_task(self, names: list[str], heavy: list[str], skipped: list[str]) -> tuple[TaskRow, str] | None:
        """Lock the first task, in claim order, that no concurrent claim has locked. Return the task and its queue.

        Tasks requested by people in `heavy` are considered only if no other task can be locked, and tasks in `skipped`
        are not considered at all. Return None if no task can be locked.
        """
        for without in [heavy, []] if heavy else [[]]:
            for task_id, queue in first_task_of_each_queue(names, limit=8, without=without, skipped=skipped):
                row = lock_queued_task(task_id, queue, exactly=bool(without or skipped))
                if row is not None:
                    return row, queue
        return None

    def _heavy_requesters(self) -> list[str]:
        """Return the ids of the people whose share of the running tasks exceeds `tasks.fair_share`."""
        share = self._settings.get(declared.FAIR_SHARE)
        if share >= 1:
            return []
        running = {user: n for user, n in _RUNNING_BY.rows({}) if user is not None}
        total = sum(running.values())
        return [user for user, n in running.items() if n > share * total] if len(running) else []

    def _is_requester_active(self, user_id: str | None) -> bool:
        """Return whether the requester's account is active. Each account is read at most once per second."""
        if user_id is None:
            return True
        cached = self._active.get(user_id)
        if cached is not None and cached[1] > time.monotonic():
            return cached[0]
        try:
            is_active = self._accounts.get(user_id).is_active
        except NotFound:
            is_active = False
        if len(self._active) > CACHED_PEOPLE:
            self._active.clear()
        self._active[user_id] = (is_active, time.monotonic() + 1)
        return is_active

    def _assignment_columns(self, row: TaskRow, worker: WorkerFacts, agent: AgentFacts) -> dict[str, Any]:
        return {
            "fence": row.fence + 1,
            "lease_id": new_id(),
            "assigned_agent_id": agent.id,
            "worker_id": worker.id,
            "assigned_at": clock.now(),
            **NOT_QUEUED,
        }

    # -- leasing

    def _lease_tasks(self, worker: WorkerFacts, chosen: list[tuple[TaskRow, AgentFacts, int]]) -> list[Claim]:
        """Lease the chosen tasks to the worker and to the chosen agents.

        The agents' slots are taken first, in the order of the agent ids, so that concurrent claims do not deadlock. The
        reservations are made last, in the same order.
        """
        for row, agent, _ in sorted(chosen, key=lambda each: each[1].id):
            if not self._agents.take_slot(agent.id, cause=tuple(row.get("cause_chain"))):
                raise _SlotTaken
        for _ in chosen:
            if not self._workers.take_slot(worker.id):
                raise _SlotTaken
        attempts = [(row, agent, amount, self._start_attempt(worker, row, agent)) for row, agent, amount in chosen]
        for row, agent, amount, (attempt_id, claim) in sorted(attempts, key=lambda each: each[1].id):
            self._budgets.reserve(row, agent, attempt_id=attempt_id, lease_until=claim.expires_at, amount=amount)
        return [claim for *_, (_, claim) in attempts]

    def _start_attempt(self, worker: WorkerFacts, row: TaskRow, agent: AgentFacts) -> tuple[str, Claim]:
        """Insert the attempt of an assigned task. Return the attempt's id and the claim for the worker."""
        token, model = TOKEN_PREFIX + secrets.token_urlsafe(32), self._models.model_name(agent)
        max_attempts = declared.max_attempts(self._settings, agent, row.get("retry_policy"))
        executor = self._payloads.find_executor(row)
        received = self._receive_messages(row, agent) if executor is None else NO_MESSAGES
        values = self._attempt_columns(worker, row, agent) | {"token_hash": hash_token(token), "model": model}
        if executor is not None:  # the output schema of an agent is for the answers of its model
            values["output_schema"] = None
        _INSERT.run({**_NEW_ATTEMPT, **values})
        if max_attempts != row.max_attempts:
            Task.update(max_attempts=max_attempts).where(Task.id == row.id).execute()
        return values["id"], self._payloads.build_claim(
            row,
            agent,
            model=model,
            token=token,
            expires_at=values["lease_until"],
            attempt=values["n"],
            group=worker.group,
            executor=executor,
            messages=received.items,
        )

    def _receive_messages(self, row: TaskRow, agent: AgentFacts) -> ClaimedMessages:
        """Deliver the agent's waiting messages to this run. Messages from untrusted sources taint the run."""
        if self.messages is None or row.lease_id is None:
            return NO_MESSAGES
        received = self.messages.for_claim(agent.id, lease_id=row.lease_id, requester_id=row.created_by)
        if received.untrusted:
            rows.taint_task(row, received.untrusted)
        return received

    def _attempt_columns(self, worker: WorkerFacts, row: TaskRow, agent: AgentFacts) -> dict[str, Any]:
        now, sources = clock.now(), row.get("taint_sources")
        policy = declared.stall_policy(self._settings, agent, row.get("stall_policy"))
        limit = cost_limit_of(row, agent)
        return {
            "id": new_id(),
            "task_id": row.id,
            "fence": row.fence,
            "n": row.attempt if row.get("resuming") else row.attempt + 1,
            "status": "assigned",
            "worker_id": worker.id,
            "agent_id": agent.id,
            "agent_version": agent.version,
            "requester_id": row.created_by,
            "lease_id": row.lease_id,
            "lease_until": self._transitions.new_lease_expiry(),
            "ack_until": clock.now(self._settings.get(declared.ACK_SECONDS)),
            "last_activity_at": now,
            "output_schema": _schema_of_agent(row, agent),
            "stall_seconds": policy.stall_seconds,
            "loop_repeats": policy.loop_repeats,
            "stall_action": policy.action,
            "cost_limit_micro": None if limit is None else limit.left_micro,
            "cost_warning_micro": None if limit is None else limit.warning_micro,
            "created_at": now,
            "tainted": row.get("tainted"),
            "taint_sources": None if sources is None else rows.to_json_text(sources),
        }


def _schema_of_agent(row: TaskRow, agent: AgentFacts) -> str | None:
    """Return the agent's output schema as JSON text.

    Return None if the agent has no schema, or if the task has a schema of its own.
    """
    schema = agent.config.get("output_schema")
    return None if schema is None or row.get("output_schema") is not None else rows.to_json_text(schema)


_NEW_ATTEMPT: dict[str, Any] = {
    field.name: field.default if not callable(field.default) else None
    for field in Attempt._meta.sorted_fields
    if field.name not in ("checkpoint", "result", "error")
}
