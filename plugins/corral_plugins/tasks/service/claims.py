"""Claims: one unit of work assigns tasks to an agent and a worker, and builds the worker's payload."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.database.dialect import savepoint
from corral.database.statement import Statement
from corral.errors import NotFound
from corral.ids import new_id
from corral.plugin import Contributions
from corral_core.accounts.api import Accounts
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.api import LLM
from corral_plugins.secrets.api import Secrets
from corral_plugins.tasks import settings as declared
from corral_plugins.tasks.api import Claim, ClaimAnswer
from corral_plugins.tasks.events import TaskAssigned
from corral_plugins.tasks.hookspecs import TaskExecutor
from corral_plugins.tasks.models import Attempt, Comment, Task, TaskRow
from corral_plugins.tasks.service import queues, rollups, rows, views
from corral_plugins.tasks.service.transitions import NOT_QUEUED, Transitions, transition
from corral_plugins.tools.api import ClaimTool, Tools
from corral_plugins.workers.api import WorkerFacts

log = logging.getLogger("corral.tasks")

GATEWAY = "/api/v1/llm"
"""The gateway's address.

It is relative, because only the worker knows the address under which it reaches the server.
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
    """Builds the payload of a claim for the worker. Runs in the claim's unit of work."""

    llm: LLM | None
    secrets: Secrets | None
    tools: Tools | None

    def __init__(self, contributions: Contributions) -> None:
        self._contributions = contributions

    def model(self, agent: AgentFacts) -> str:
        """Return the model of the agent as `provider/model`. The gateway's defaults fill in missing parts."""
        provider, model = agent.llm_provider, agent.llm_model
        if self.llm is not None:
            if provider is None:
                default = self.llm.default_model()
                return default if model is None else f"{default.partition('/')[0]}/{model}"
            if model is None:
                model = self.llm.default_model_of(provider)
        return f"{provider or 'default'}/{model or 'default'}"

    def claim(
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
        """Return the claim payload of a task that was just leased to a worker of this group."""
        assert row.lease_id is not None
        config = {key: value for key, value in agent.config.items() if key != "fallback_models"}
        about = {
            "id": row.id,
            "source": {"type": row.source_type, "id": row.source_id},
            "workflow_run_id": row.workflow_run_id,
            "step_run_id": row.get("step_run_id"),
        }
        for _, executor in self._contributions.for_hook("corral_task_executors"):
            if _handles(executor, about):
                config["executor"] = executor.prepare(about)
                break
        return Claim(
            task=msgspec.Raw(views.read(row.id)),
            agent={
                "id": agent.id,
                "name": agent.name,
                "version": agent.version,
                "system_prompt": agent.system_prompt,
                "model": model,
                "fallback_models": agent.config.get("fallback_models") or [],
                "tools": self._tools(row, agent, model),
                "config": config,
            },
            lease_id=row.lease_id,
            fence=row.fence,
            expires_at=expires_at,
            attempt=attempt,
            agent_token=token,
            gateway_url=GATEWAY,
            resume=self._resume(row),
            context={"memories": [], "knowledge": [], "messages": [], "comments": _comments(row.id)},
            secrets=[] if self.secrets is None or group is None else self.secrets.of_group(group),
        )

    def _tools(self, row: TaskRow, agent: AgentFacts, model: str) -> list[ClaimTool]:
        """Return the tools of the run.

        These are the agent's tools, limited to those that the task allows. A model without tool calls gets no tools.
        """
        if self.tools is None or not agent.enabled_tools or row.worker_id is None:
            return []
        if self.llm is not None and self.llm.capabilities(model).get("tools") is False:
            return []
        return self.tools.offered(
            enabled=agent.enabled_tools,
            policy=agent.tool_policy,
            allowed=row.get("allowed_tools"),
            worker_id=row.worker_id,
        )

    def _resume(self, row: TaskRow) -> dict[str, Any] | None:
        """Return the last checkpoint and the answers received since then, or null for a first attempt."""
        found = _CHECKPOINT.one({"id": row.id, "floor": row.get("checkpoint_floor")}) if row.fence > 1 else None
        given = row.get("resume")
        if found is None and given is None:
            return None
        checkpoint = None if found is None else msgspec.Raw(found[0])
        return {"checkpoint": checkpoint, "tool_results": [], **(given or {})}


def _handles(executor: TaskExecutor, task: dict[str, Any]) -> bool:
    """Return whether the executor handles the task.

    If the executor raises an error, return False and count the failure against its plugin.
    """
    try:
        return executor.handles(task)
    except Exception:
        log.exception("an executor could not say whether it handles a task", extra={"task": task["id"]})
        return False


def _comments(task_id: str) -> list[dict[str, Any]]:
    """Return the latest comments, oldest first.

    They are marked as untrusted, because the model must treat them as data and not as instructions.
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


def token_hash(token: str) -> str:
    """Return the hash of an attempt token. The database stores only this hash."""
    return hashlib.sha256(token.encode()).hexdigest()


class _SlotTaken(Exception):
    """Raised if another claim took the slot after the task was chosen and before it was leased."""


class Claims:
    """Leases tasks to workers. Rows are locked in the order tasks, their agents, the worker."""

    switch: KillSwitch | None
    tools: Tools | None

    def __init__(self, transitions: Transitions, payloads: ClaimPayloads, accounts: Accounts) -> None:
        self._transitions, self._payloads, self._accounts = transitions, payloads, accounts
        self._settings, self._agents, self._workers = transitions.settings, transitions.agents, transitions.workers
        self._active: dict[str, tuple[bool, float]] = {}

    def claim(
        self, worker_id: str, *, max_tasks: int, agent_ids: Sequence[str] | None, tries: int = TRIES
    ) -> ClaimAnswer:
        """Implement `Tasks.claim`.

        If another claim takes a slot first, the claim starts again, with at most `tries` tries.
        """
        worker = self._workers.facts(worker_id)
        if worker is None:
            raise NotFound()
        if self._is_stopped():
            return ClaimAnswer(tasks=[], reason="kill_switch")
        if worker.status == "draining":
            return ClaimAnswer(tasks=[], reason="draining")
        free = worker.max_agents - worker.active_leases
        if not worker.claims or free <= 0:
            return ClaimAnswer(tasks=[], reason="at_capacity" if worker.claims else "none")
        agents = self._agents.eligible(
            worker_id=worker.id, group=worker.group, labels=worker.labels, agent_ids=agent_ids
        )
        if not agents:
            return ClaimAnswer(tasks=[], reason="none")
        claims: list[Claim] = []
        counted = rollups.snapshot()
        try:
            with savepoint():
                claims = self._lease(worker, self._choose(worker, agents, min(max_tasks, free)))
        except _SlotTaken:
            rollups.restore(counted)
            if tries > 1:
                return self.claim(worker_id, max_tasks=max_tasks, agent_ids=agent_ids, tries=tries - 1)
        return ClaimAnswer(tasks=claims, reason="ok" if claims else "none")

    def claimable(self, worker_id: str, *, limit: int) -> list[str]:
        """Return the ids of the tasks that a claim would lease now, in claim order.

        These are the first tasks of the queues that the worker may serve.
        """
        worker = self._workers.facts(worker_id)
        if worker is None:
            raise NotFound()
        if not worker.claims or self._is_stopped():
            return []
        agents = self._agents.eligible(worker_id=worker.id, group=worker.group, labels=worker.labels, agent_ids=None)
        return queues.first_of(queues.served(agents, worker, self.tools), limit=limit) if agents else []

    def _is_stopped(self) -> bool:
        return self.switch is not None and self.switch.state().engaged

    # -- choosing

    def _choose(
        self, worker: WorkerFacts, agents: Sequence[AgentFacts], wanted: int
    ) -> list[tuple[TaskRow, AgentFacts]]:
        served = queues.served(agents, worker, self.tools)
        slots = Counter({agent.id: agent.max_concurrent_tasks - agent.active_tasks for agent in agents})
        heavy = self._heavy_requesters()
        chosen: list[tuple[TaskRow, AgentFacts]] = []
        tries = 0
        while len(chosen) < wanted and tries < wanted + 8:
            tries += 1
            names = [name for name, each in served.items() if any(slots[agent.id] > 0 for agent in each)]
            found = self._first(names, heavy)
            if found is None:
                break
            row, queue = found
            if not self._is_active(row.created_by):
                _HOLD.run({"user": row.created_by})
                continue
            able = [each for each in served[queue] if slots[each.id] > 0]
            agent = min(able, key=lambda each: each.max_concurrent_tasks - slots[each.id])
            transition(row, "assigned", event=TaskAssigned, **self._assigned(row, worker, agent))
            slots[agent.id] -= 1
            chosen.append((row, agent))
        return chosen

    def _first(self, names: list[str], heavy: list[str]) -> tuple[TaskRow, str] | None:
        """Return the first task in claim order, with its queue, that no concurrent claim is taking."""
        for without in [heavy, []] if heavy else [[]]:
            for task_id, queue in queues.heads(names, limit=8, without=without):
                row = queues.take(task_id, queue, exactly=bool(without))
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

    def _is_active(self, user_id: str | None) -> bool:
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

    def _assigned(self, row: TaskRow, worker: WorkerFacts, agent: AgentFacts) -> dict[str, Any]:
        return {
            "fence": row.fence + 1,
            "lease_id": new_id(),
            "assigned_agent_id": agent.id,
            "worker_id": worker.id,
            "assigned_at": clock.now(),
            **NOT_QUEUED,
        }

    # -- leasing

    def _lease(self, worker: WorkerFacts, chosen: list[tuple[TaskRow, AgentFacts]]) -> list[Claim]:
        """Lease the chosen tasks. The slots of the agents are taken first, in the same order in every claim."""
        for agent_id in sorted(agent.id for _, agent in chosen):
            if not self._agents.lease_started(agent_id):
                raise _SlotTaken
        for _ in chosen:
            if not self._workers.lease_started(worker.id):
                raise _SlotTaken
        return [self._start_attempt(worker, row, agent) for row, agent in chosen]

    def _start_attempt(self, worker: WorkerFacts, row: TaskRow, agent: AgentFacts) -> Claim:
        assert row.lease_id is not None
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now, sources = clock.now(), row.get("taint_sources")
        policy = declared.stall_policy(self._settings, row.get("stall_policy"), agent.stall_policy)
        retry = declared.retry_policy(self._settings, row.get("retry_policy"), agent.retry_policy)
        model = self._payloads.model(agent)
        values: dict[str, Any] = {
            "id": new_id(),
            "task_id": row.id,
            "fence": row.fence,
            "n": row.attempt if row.get("resuming") else row.attempt + 1,
            "status": "assigned",
            "worker_id": worker.id,
            "agent_id": agent.id,
            "agent_version": agent.version,
            "model": model,
            "requester_id": row.created_by,
            "lease_id": row.lease_id,
            "token_hash": token_hash(token),
            "lease_until": self._transitions.lease_until(),
            "ack_until": clock.now(self._settings.get(declared.ACK_SECONDS)),
            "last_activity_at": now,
            "stall_seconds": policy.stall_seconds,
            "loop_repeats": policy.loop_repeats,
            "stall_action": policy.action,
            "created_at": now,
            "tainted": row.get("tainted"),
            "taint_sources": None if sources is None else rows.as_text(sources),
        }
        _INSERT.run({**_NEW_ATTEMPT, **values})
        if retry.max_attempts != row.max_attempts:
            Task.update(max_attempts=retry.max_attempts).where(Task.id == row.id).execute()
        return self._payloads.claim(
            row,
            agent,
            model=model,
            token=token,
            expires_at=values["lease_until"],
            attempt=values["n"],
            group=worker.group,
        )


_NEW_ATTEMPT: dict[str, Any] = {
    field.name: field.default if not callable(field.default) else None
    for field in Attempt._meta.sorted_fields
    if field.name not in ("checkpoint", "result", "error")
}
