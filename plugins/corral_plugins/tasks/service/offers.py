"""What a worker gets with a claim: the task, its agent's configuration, what attempts and people left for it."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from corral.database.statement import Statement
from corral.plugin import Contributions
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.api import LLM
from corral_plugins.secrets.api import Secrets
from corral_plugins.tasks.api import Claim
from corral_plugins.tasks.hookspecs import TaskExecutor
from corral_plugins.tasks.models import Attempt, Comment, Task
from corral_plugins.tasks.service import rows, views
from corral_plugins.tasks.service.rows import Row
from corral_plugins.tools.api import ClaimTool, Tools

log = logging.getLogger("corral.tasks")

GATEWAY = "/api/v1/llm"
"""Relative: the worker knows by which address it reaches its server."""
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
_SOURCE = Statement(
    lambda p: (
        Task.select(Task.source_type, Task.source_id, Task.workflow_run_id, Task.step_run_id)
        .where(Task.id == p("id"))
        .tuples()
    )
)


class Offers:
    """Builds claims; joins the unit of the claim."""

    llm: LLM | None
    secrets: Secrets | None
    tools: Tools | None

    def __init__(self, contributions: Contributions) -> None:
        self._contributions = contributions

    def model(self, agent: AgentFacts) -> str:
        """The agent's model as `provider/model`; the gateway's defaults where it names none."""
        provider, model = agent.llm_provider, agent.llm_model
        if self.llm is not None:
            if provider is None:
                default = self.llm.default_model()
                return default if model is None else f"{default.partition('/')[0]}/{model}"
            if model is None:
                model = self.llm.default_model_of(provider)
        return f"{provider or 'default'}/{model or 'default'}"

    def claim(
        self, row: Row, agent: AgentFacts, *, model: str, token: str, expires_at: str, attempt: int, group: str | None
    ) -> Claim:
        """The claim of a task that was just leased, for a worker of the group."""
        assert row.lease_id is not None
        source_type, source_id, run, step = _SOURCE.one({"id": row.id}) or ("api", None, None, None)
        config = {key: value for key, value in agent.config.items() if key != "fallback_models"}
        about = {
            "id": row.id,
            "source": {"type": source_type, "id": source_id},
            "workflow_run_id": run,
            "step_run_id": step,
        }
        for _, executor in self._contributions.of("corral_task_executors"):
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

    def _tools(self, row: Row, agent: AgentFacts, model: str) -> list[ClaimTool]:
        """The tools of the run: the agent's, narrowed by the task. A model that cannot call tools gets none."""
        if self.tools is None or not agent.enabled_tools or row.worker_id is None:
            return []
        if self.llm is not None and self.llm.capabilities(model).get("tools") is False:
            return []
        return self.tools.offered(
            enabled=agent.enabled_tools,
            policy=agent.tool_policy,
            allowed=rows.parsed(row.allowed_tools),
            worker_id=row.worker_id,
        )

    def _resume(self, row: Row) -> dict[str, Any] | None:
        """The last checkpoint and what came since; null for a first attempt."""
        found = _CHECKPOINT.one({"id": row.id, "floor": row.checkpoint_floor}) if row.fence > 1 else None
        given = rows.parsed(row.resume)
        if found is None and given is None:
            return None
        checkpoint = None if found is None else msgspec.Raw(found[0])
        return {"checkpoint": checkpoint, "tool_results": [], **(given or {})}


def _handles(executor: TaskExecutor, task: dict[str, Any]) -> bool:
    """Whether it does; one that fails, which is counted against its plugin, does not."""
    try:
        return executor.handles(task)
    except Exception:
        log.exception("an executor could not say whether it handles a task", extra={"task": task["id"]})
        return False


def _comments(task_id: str) -> list[dict[str, Any]]:
    """The last comments, oldest first. What people write is data for the model, not instructions."""
    return [
        {"source": {"type": author_type, "id": author_id}, "trust": "untrusted", "body": body, "created_at": created_at}
        for author_type, author_id, body, created_at in reversed(_COMMENTS.rows({"id": task_id}))
    ]
