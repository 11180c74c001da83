"""Gathers what a decision depends on. Joins the caller's unit; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import NotFound
from corral.plugin import Settings
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import AgentFacts
from corral_plugins.tools.api import ToolContext
from corral_plugins.tools.service.decision import Case, Rule, rule_of
from corral_plugins.tools.service.opinions import opinion
from corral_plugins.tools.service.registry import Known, Registry
from corral_plugins.tools.settings import MAX_CALLS, TAINT_ENABLED
from corral_plugins.workers.api import Workers

MAX_RUNNING = 5


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks for a tool: the agent, the person it works for, and the run. `worker_id` None: any worker online."""

    agent: AgentFacts | None
    requester_id: str | None
    worker_id: str | None = None
    allowed_tools: Sequence[str] | None = None
    tainted: bool = False
    task_id: str = ""
    lease_id: str = ""
    fence: int = 0
    calls: int = 0
    running: int = 0


class Cases:
    """From a call to the case that `decide` judges, and to what its tool is run with."""

    workers: Workers | None

    def __init__(
        self, registry: Registry, accounts: Accounts, permissions: Permissions, settings: Settings, work: Work
    ) -> None:
        self._registry, self._accounts, self._permissions = registry, accounts, permissions
        self._settings, self._work = settings, work

    def of(self, known: Known | None, name: str, call_id: str, arguments: Any, subject: Subject) -> Case:
        """The case of a call."""
        if known is None:
            return Case(tool=name)
        tool, agent = known.tool, subject.agent
        rule = rule_of(agent.tool_policy, name) if agent is not None else Rule()
        caller = self.caller(subject)
        said = opinion(known, rule, arguments, self.context(known, call_id, subject, caller))
        return Case(
            tool=name,
            risk=known.risk,
            enabled=known.changes.enabled,
            enabled_tools=agent.enabled_tools if agent is not None else (),
            allowed_tools=subject.allowed_tools,
            requester_is_active=caller is not None,
            permissions=caller.permissions if caller is not None else frozenset(),
            permission=tool.permission,
            sees=said.sees,
            offered=tool.runs == "server" or self._is_offered(name, subject.worker_id),
            faults=said.faults,
            admitted=said.admitted,
            rule=rule,
            default_policy=known.default_policy,
            tainted=subject.tainted and self._settings.get(TAINT_ENABLED),
            is_trusted=said.is_trusted,
            target_asks=said.target_asks,
            calls=subject.calls,
            max_calls=self._settings.get(MAX_CALLS),
            running=subject.running,
            max_running=MAX_RUNNING,
        )

    def context(self, known: Known, call_id: str, subject: Subject, caller: Principal | None) -> ToolContext:
        """What the tool is run with."""
        return ToolContext(
            caller=caller or Principal(kind="agent", id=""),
            task_id=subject.task_id,
            lease_id=subject.lease_id,
            call_id=call_id,
            config=known.config,
            timeout_seconds=known.timeout_seconds,
            work=self._work,
        )

    def caller(self, subject: Subject) -> Principal | None:
        """The agent with the rights that its requester's role has now; None: the requester is not active any more.

        A task that nobody asked for has the rights of a member.
        """
        role = "member"
        if subject.requester_id is not None:
            try:
                requester = self._accounts.get(subject.requester_id)
            except NotFound:
                return None
            if not requester.is_active:
                return None
            role = requester.role
        agent_id = subject.agent.id if subject.agent is not None else ""
        return Principal(
            kind="agent",
            id=agent_id,
            agent_id=agent_id,
            user_id=subject.requester_id,
            role=role,
            permissions=self._permissions.of(role),
            task_id=subject.task_id or None,
            lease_id=subject.lease_id or None,
        )

    def _is_offered(self, name: str, worker_id: str | None) -> bool:
        """A worker that lists no tools offers all that its agents need."""
        if self.workers is None:
            return False
        if worker_id is None:
            return any(not each.tools or name in each.tools for each in self.workers.fleet())
        worker = self.workers.facts(worker_id)
        return worker is not None and (not worker.tools or name in worker.tools)
