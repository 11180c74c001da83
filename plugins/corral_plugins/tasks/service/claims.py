"""Claims, which lease the first tasks of the queues to agents and workers.

A claim chooses and leases its tasks in one unit of work. The cost of a claim does not depend on the number of tasks.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.dialect import execute, json_array_strings, savepoint
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.errors import NotFound
from corral.ids import new_id
from corral.plugin import Contributions
from corral_core.accounts.api import Accounts
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.api import LLM
from corral_plugins.secrets.api import Secrets
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import Claim, ClaimResponse
from corral_plugins.tasks.events import TaskAssigned
from corral_plugins.tasks.hookspecs import TaskExecutor
from corral_plugins.tasks.models import Attempt, Comment, Task, TaskRow
from corral_plugins.tasks.service import rows, statistics
from corral_plugins.tasks.service.rows import TASK_COLUMNS
from corral_plugins.tasks.service.transitions import NOT_QUEUED, TaskTransitions, transition
from corral_plugins.tools.api import ClaimTool, Tools, has_tools
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
ID_LENGTH = 36
_COLUMNS = "id, queue, rank, deadline_key, available_at, created_at"

_TAKE_FREE = Statement(
    lambda p: locked(
        Task.select(*TASK_COLUMNS)
        .where(rows.PENDING & (Task.queue == p("queue")))
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


def worker_has_tools(worker: WorkerFacts, tools: Sequence[str], service: Tools | None) -> bool:
    """Return whether the worker and the server together provide these tools.

    A worker that lists no tools provides all tools.
    """
    if not worker.tools:
        return True
    of_server = service.server_tools() if service is not None else ()
    return has_tools([*worker.tools, *of_server], tools)


def queues_for_agents(
    agents: Sequence[AgentFacts], worker: WorkerFacts, service: Tools | None
) -> dict[str, list[AgentFacts]]:
    """Return the queues that these agents may serve on this worker, each with the agents that may serve it.

    The agents keep the given order.
    """
    found: dict[str, list[AgentFacts]] = {}
    for agent in agents:
        for base in (f"agent:{agent.id}", f"role:{agent.role}", "any"):
            found.setdefault(base, []).append(agent)
    kinds: dict[tuple[str, ...], int] = {}  # many agents have the same tools, so each set of tools is checked once
    kind_of = {agent.id: kinds.setdefault(tuple(agent.enabled_tools), len(kinds)) for agent in agents}
    for queue, text in _queues_with_tools():
        of_base = found.get(queue.partition("#")[0])
        tools = msgspec.json.decode(text) if of_base else []
        if of_base and worker_has_tools(worker, tools, service):
            kinds_able = {kind for enabled, kind in kinds.items() if has_tools(enabled, tools)}
            able = [agent for agent in of_base if kind_of[agent.id] in kinds_able]
            if able:
                found[queue] = able
    return found


def first_task_of_each_queue(
    queues: Iterable[str], *, limit: int, without: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return the first task of each queue as `(task id, queue)`, in claim order, and at most `limit` tasks in total.

    Tasks of the requesters in `without` are skipped.
    """
    others, parameters = "", [rows.to_json_text(list(queues)), limit]
    if without:
        others, parameters = (
            _OTHERS.format(users=json_array_strings("u")),
            [rows.to_json_text(list(without)), *parameters],
        )
    found = execute(_HEADS.format(queues=json_array_strings("q"), others=others), parameters).fetchall()
    return [(head[-ID_LENGTH:], queue) for queue, head in found if head != "none"]


def lock_queued_task(task_id: str, queue: str, *, exactly: bool) -> TaskRow | None:
    """Lock a queued task and return its row, or None if concurrent claims have taken it.

    If `exactly` is set, lock the task `task_id`. Otherwise, lock the first task of the queue that no concurrent claim
    has locked.
    """
    found = _TAKE_THIS.one({"id": task_id}) if exactly else _TAKE_FREE.one({"queue": queue})
    return None if found is None else TaskRow(*found)


def first_task_ids(names: Iterable[str], *, limit: int) -> list[str]:
    """Return the ids of the first `limit` tasks of these queues, which are merged in claim order."""
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


# -- claims


log = logging.getLogger("corral.tasks")

GATEWAY = "/api/v1/llm"
"""The path of the gateway.

Claims contain no host, because only the worker knows the address at which it reaches the server.
"""
COMMENTS = 50

_CHECKPOINT = Statement(
    lambda p: (
        Attempt.select(Attempt.checkpoint)
        .where((Attempt.task_id == p("id")) & (Attempt.fence > p("floor")) & Attempt.checkpoint_step.is_null(False))
        .order_by(Attempt.fence.desc())
        .limit(1)
        .tuples()
    )
)
_COMMENTS = Statement(
    lambda p: (
        Comment.select(Comment.author_type, Comment.author_id, Comment.body, Comment.created_at)
        .where(Comment.task_id == p("id"))
        .order_by(Comment.created_at.desc(), Comment.id.desc())
        .limit(COMMENTS)
        .tuples()
    )
)


class ClaimPayloads:
    """Builds the payload of a claim: the data that the worker needs to run the task.

    Every method runs in the unit of work of the claim.
    """

    llm: LLM | None
    secrets: Secrets | None
    tools: Tools | None

    def __init__(self, contributions: Contributions) -> None:
        self._contributions = contributions

    def model_name(self, agent: AgentFacts) -> str:
        """Return the model of the agent as `provider/model`.

        If the agent sets no provider or no model, the default of the LLM gateway is used.
        """
        provider, model = agent.llm_provider, agent.llm_model
        if self.llm is not None:
            if provider is None:
                default = self.llm.default_model()
                return default if model is None else f"{default.partition('/')[0]}/{model}"
            if model is None:
                model = self.llm.default_model_of(provider)
        return f"{provider or 'default'}/{model or 'default'}"

    def build_claim(
        self,
        row: TaskRow,
        agent: AgentFacts,
        *,
        model: str,
        token: str,
        expires_at: str,
        attempt: int,
        group: str | None,
    ) -> Claim:
        """Return the claim payload of a task that was just leased to a worker.

        `group` is the group of the worker, which determines the available secrets.
        """
        assert row.lease_id is not None
        return Claim(
            task=msgspec.Raw(rows.read_encoded_task(row.id)),
            agent={
                "id": agent.id,
                "name": agent.name,
                "version": agent.version,
                "system_prompt": agent.system_prompt,
                "model": model,
                "fallback_models": agent.config.get("fallback_models") or [],
                "tools": self._offered_tools(row, agent, model),
                "config": self._agent_config(row, agent),
            },
            lease_id=row.lease_id,
            fence=row.fence,
            expires_at=expires_at,
            attempt=attempt,
            agent_token=token,
            gateway_url=GATEWAY,
            resume=self._resume_data(row),
            context={"memories": [], "knowledge": [], "messages": [], "comments": _latest_comments(row.id)},
            secrets=[] if self.secrets is None or group is None else self.secrets.names_for_group(group),
        )

    def _agent_config(self, row: TaskRow, agent: AgentFacts) -> dict[str, Any]:
        """Return the configuration of the agent.

        If a task executor handles the task, `executor` contains the configuration that this executor prepares.
        """
        config = {key: value for key, value in agent.config.items() if key != "fallback_models"}
        about = {
            "id": row.id,
            "source": {"type": row.source_type, "id": row.source_id},
            "workflow_run_id": row.workflow_run_id,
            "step_run_id": row.get("step_run_id"),
        }
        for _, executor in self._contributions.for_hook("corral_task_executors"):
            if _is_handled_by(executor, about):
                return {**config, "executor": executor.prepare(about)}
        return config

    def _offered_tools(self, row: TaskRow, agent: AgentFacts, model: str) -> list[ClaimTool]:
        """Return the tools of the run.

        These are the agent's tools, limited to those that the task allows. A model without tool calls gets no tools.
        """
        if self.tools is None or not agent.enabled_tools or row.worker_id is None:
            return []
        if self.llm is not None and self.llm.capabilities(model).get("tools") is False:
            return []
        return self.tools.tools_for_run(
            enabled=agent.enabled_tools,
            policy=agent.tool_policy,
            allowed=row.get("allowed_tools"),
            worker_id=row.worker_id,
        )

    def _resume_data(self, row: TaskRow) -> dict[str, Any] | None:
        """Return the last checkpoint and the answers received since then, or None if there are neither."""
        found = _CHECKPOINT.one({"id": row.id, "floor": row.get("checkpoint_floor")}) if row.fence > 1 else None
        given = row.get("resume")
        if found is None and given is None:
            return None
        checkpoint = None if found is None else msgspec.Raw(found[0])
        return {"checkpoint": checkpoint, "tool_results": [], **(given or {})}


def _is_handled_by(executor: TaskExecutor, task: dict[str, Any]) -> bool:
    """Return whether the executor handles the task.

    If the executor raises an exception, log the exception and return False.
    """
    try:
        return executor.handles(task)
    except Exception:
        log.exception("a task executor raised an exception", extra={"task": task["id"]})
        return False


def _latest_comments(task_id: str) -> list[dict[str, Any]]:
    """Return the latest comments, oldest first.

    The comments are marked as untrusted, because the model must treat them as data and not as instructions.
    """
    return [
        {"source": {"type": author_type, "id": author_id}, "trust": "untrusted", "body": body, "created_at": created_at}
        for author_type, author_id, body, created_at in reversed(_COMMENTS.rows({"id": task_id}))
    ]


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
    """Leases tasks to workers. Every claim locks rows in the same order: tasks, their agents, the worker."""

    switch: KillSwitch | None
    tools: Tools | None

    def __init__(self, transitions: TaskTransitions, payloads: ClaimPayloads, accounts: Accounts) -> None:
        self._transitions, self._payloads, self._accounts = transitions, payloads, accounts
        self._settings, self._agents, self._workers = transitions.settings, transitions.agents, transitions.workers
        self._active: dict[str, tuple[bool, float]] = {}

    def claim(
        self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None, tries: int = TRIES
    ) -> ClaimResponse:
        """Lease tasks to a worker. Implements `Tasks.claim`.

        If a concurrent claim takes the last free slot of the worker or of a chosen agent, the claim is repeated. It is
        tried at most `tries` times in total.
        """
        worker = self._workers.find(worker_id)
        if worker is None:
            raise NotFound()
        if self._is_kill_switch_engaged():
            return ClaimResponse(tasks=[], reason="kill_switch")
        if worker.status == "draining":
            return ClaimResponse(tasks=[], reason="draining")
        free = worker.max_agents - worker.active_leases
        if not worker.can_claim or free <= 0:
            return ClaimResponse(tasks=[], reason="at_capacity" if worker.can_claim else "none")
        agents = self._agents.eligible_agents(
            worker_id=worker.id, group=worker.group, labels=worker.labels, agent_ids=agent_ids
        )
        if not agents:
            return ClaimResponse(tasks=[], reason="none")
        claims: list[Claim] = []
        counted = statistics.save_deltas()
        try:
            with savepoint():
                claims = self._lease_tasks(worker, self._choose_tasks(worker, agents, min(max_tasks, free)))
        except _SlotTaken:
            statistics.restore_deltas(counted)
            if tries > 1:
                return self.claim(worker_id, max_tasks=max_tasks, agent_ids=agent_ids, tries=tries - 1)
        return ClaimResponse(tasks=claims, reason="ok" if claims else "none")

    def claimable(self, worker_id: str, *, limit: int) -> list[str]:
        """Return the ids of the tasks that a claim would lease now, in claim order.

        These are the first tasks of the queues that the worker may serve.
        """
        worker = self._workers.find(worker_id)
        if worker is None:
            raise NotFound()
        if not worker.can_claim or self._is_kill_switch_engaged():
            return []
        agents = self._agents.eligible_agents(
            worker_id=worker.id, group=worker.group, labels=worker.labels, agent_ids=None
        )
        return first_task_ids(queues_for_agents(agents, worker, self.tools), limit=limit) if agents else []

    def _is_kill_switch_engaged(self) -> bool:
        return self.switch is not None and self.switch.state().engaged

    # -- choosing

    def _choose_tasks(
        self, worker: WorkerFacts, agents: Sequence[AgentFacts], wanted: int
    ) -> list[tuple[TaskRow, AgentFacts]]:
        served_queues = queues_for_agents(agents, worker, self.tools)
        slots = Counter({agent.id: agent.max_concurrent_tasks - agent.active_tasks for agent in agents})
        heavy = self._heavy_requesters()
        chosen: list[tuple[TaskRow, AgentFacts]] = []
        tries = 0
        while len(chosen) < wanted and tries < wanted + 8:
            tries += 1
            names = [name for name, each in served_queues.items() if any(slots[agent.id] > 0 for agent in each)]
            found = self._lock_first_task(names, heavy)
            if found is None:
                break
            row, queue = found
            if not self._is_requester_active(row.created_by):
                _HOLD.run({"user": row.created_by})
                continue
            able = [each for each in served_queues[queue] if slots[each.id] > 0]
            agent = min(able, key=lambda each: each.max_concurrent_tasks - slots[each.id])
            transition(row, "assigned", event=TaskAssigned, **self._assignment_columns(row, worker, agent))
            slots[agent.id] -= 1
            chosen.append((row, agent))
        return chosen

    def _lock_first_task(self, names: list[str], heavy: list[str]) -> tuple[TaskRow, str] | None:
        """Lock the first task in claim order that no concurrent claim has locked. Return the task with its queue."""
        for without in [heavy, []] if heavy else [[]]:
            for task_id, queue in first_task_of_each_queue(names, limit=8, without=without):
                row = lock_queued_task(task_id, queue, exactly=bool(without))
                if row is not None:
                    return row, queue
        return None

    def _heavy_requesters(self) -> list[str]:
        """Return the ids of the people whose share of the running tasks is greater than `tasks.fair_share`."""
        share = self._settings.get(declared.FAIR_SHARE)
        if share >= 1:
            return []
        running = {user: n for user, n in _RUNNING_BY.rows({}) if user is not None}
        total = sum(running.values())
        return [user for user, n in running.items() if n > share * total] if len(running) else []

    def _is_requester_active(self, user_id: str | None) -> bool:
        """Return whether the requester's account is active. The account is read at most once per second and person."""
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

    def _lease_tasks(self, worker: WorkerFacts, chosen: list[tuple[TaskRow, AgentFacts]]) -> list[Claim]:
        """Lease the chosen tasks to the worker and to the chosen agents.

        The slots of the agents are taken first, in the order of the agent ids, so that concurrent claims do not
        deadlock.
        """
        for agent_id in sorted(agent.id for _, agent in chosen):
            if not self._agents.take_slot(agent_id):
                raise _SlotTaken
        for _ in chosen:
            if not self._workers.take_slot(worker.id):
                raise _SlotTaken
        return [self._start_attempt(worker, row, agent) for row, agent in chosen]

    def _start_attempt(self, worker: WorkerFacts, row: TaskRow, agent: AgentFacts) -> Claim:
        token, model = TOKEN_PREFIX + secrets.token_urlsafe(32), self._payloads.model_name(agent)
        retry = declared.retry_policy(self._settings, row.get("retry_policy"), agent.retry_policy)
        values = self._attempt_columns(worker, row, agent) | {"token_hash": hash_token(token), "model": model}
        _INSERT.run({**_NEW_ATTEMPT, **values})
        if retry.max_attempts != row.max_attempts:
            Task.update(max_attempts=retry.max_attempts).where(Task.id == row.id).execute()
        return self._payloads.build_claim(
            row,
            agent,
            model=model,
            token=token,
            expires_at=values["lease_until"],
            attempt=values["n"],
            group=worker.group,
        )

    def _attempt_columns(self, worker: WorkerFacts, row: TaskRow, agent: AgentFacts) -> dict[str, Any]:
        now, sources = clock.now(), row.get("taint_sources")
        policy = declared.stall_policy(self._settings, row.get("stall_policy"), agent.stall_policy)
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
            "stall_seconds": policy.stall_seconds,
            "loop_repeats": policy.loop_repeats,
            "stall_action": policy.action,
            "created_at": now,
            "tainted": row.get("tainted"),
            "taint_sources": None if sources is None else rows.to_json_text(sources),
        }


_NEW_ATTEMPT: dict[str, Any] = {
    field.name: field.default if not callable(field.default) else None
    for field in Attempt._meta.sorted_fields
    if field.name not in ("checkpoint", "result", "error")
}
