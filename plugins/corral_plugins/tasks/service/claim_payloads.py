"""The payload of a claim: the data that a worker needs to run a task."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from corral.database.statement import Statement
from corral.plugin import Contributions
from corral_plugins.agents.api import AgentFacts
from corral_plugins.llm.api import LLM
from corral_plugins.secrets.api import Secrets
from corral_plugins.tasks.api import Claim, TaskExecutor
from corral_plugins.tasks.models import Attempt, Comment, TaskRow
from corral_plugins.tasks.service import rows
from corral_plugins.tools.api import ClaimTool, Tools

log = logging.getLogger("corral.tasks")

GATEWAY = "/api/v1/llm"
"""The path of the LLM gateway.

Claims contain no host because only the worker knows the address at which it reaches the server.
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
    """Builds claim payloads.

    Every method runs in the unit of work of the claim.
    """

    llm: LLM | None
    secrets: Secrets | None
    tools: Tools | None

    def __init__(self, contributions: Contributions) -> None:
        self._contributions = contributions

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
        executor: dict[str, Any] | None,
        messages: list[dict[str, Any]],
    ) -> Claim:
        """Return the claim payload of a task that was just leased to a worker.

        `group` is the worker's group, which determines the available secrets. `executor` is the configuration that
        `find_executor` returned. `messages` are the messages that this claim delivers.
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
                "config": _agent_config(agent, executor),
            },
            lease_id=row.lease_id,
            fence=row.fence,
            expires_at=expires_at,
            attempt=attempt,
            agent_token=token,
            gateway_url=GATEWAY,
            resume=self._resume_data(row),
            context={"memories": [], "knowledge": [], "messages": messages, "comments": _latest_comments(row.id)},
            secrets=[] if self.secrets is None or group is None else self.secrets.names_for_group(group),
        )

    def find_executor(self, row: TaskRow) -> dict[str, Any] | None:
        """Return the configuration that the task's executor provides, or None if the agent loop runs the task."""
        about = {
            "id": row.id,
            "source": {"type": row.source_type, "id": row.source_id},
            "workflow_run_id": row.workflow_run_id,
            "step_run_id": row.get("step_run_id"),
        }
        for _, executor in self._contributions.for_hook("corral_task_executors"):
            if _is_handled_by(executor, about):
                prepared: dict[str, Any] = executor.prepare(about)
                return prepared
        return None

    def _offered_tools(self, row: TaskRow, agent: AgentFacts, model: str) -> list[ClaimTool]:
        """Return the tools that are offered to the run.

        These are the agent's tools, limited to those that the task allows. If the model does not support tool calls, no
        tools are offered.
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


def _agent_config(agent: AgentFacts, executor: dict[str, Any] | None) -> dict[str, Any]:
    config = {key: value for key, value in agent.config.items() if key != "fallback_models"}
    return config if executor is None else {**config, "executor": executor}


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
    """Return the latest comments on the task, oldest first.

    The comments are marked as untrusted because the model must treat them as data and not as instructions.
    """
    return [
        {"source": {"type": author_type, "id": author_id}, "trust": "untrusted", "body": body, "created_at": created_at}
        for author_type, author_id, body, created_at in reversed(_COMMENTS.rows({"id": task_id}))
    ]
