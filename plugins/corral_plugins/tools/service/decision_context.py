"""The collection of everything that the decision on a tool call depends on.

This is the subject of the call, the permissions of the subject, and the results of the tool's own checks and schema.
The code reads in the caller's unit of work and changes nothing. If a check of a plugin raises an exception, the call is
denied.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Fault, Invalid, NotFound
from corral.plugin import Settings
from corral.schema.data import check_user_schema, json_schema_problems
from corral_core.accounts.api import Accounts
from corral_plugins.agents.api import AgentFacts
from corral_plugins.tools.api import Target, Tool, ToolContext
from corral_plugins.tools.service.decision import DecisionContext, Rule, rule_of
from corral_plugins.tools.service.registry import RegisteredTool
from corral_plugins.tools.settings import MAX_CALLS, TAINT_ENABLED
from corral_plugins.workers.api import Workers

log = logging.getLogger("corral.tools")

MAX_RUNNING = 5
NO_CONFIG: dict[str, Any] = {"type": "object", "additionalProperties": False}


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """The subject of a tool call: the agent, the person who requested the task, and the run.

    `worker_id`: the worker of the run; None stands for any online worker.
    """

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


class ContextBuilder:
    """The builder of the context for a decision, and of the context in which a tool runs."""

    workers: Workers | None

    def __init__(self, accounts: Accounts, permissions: Permissions, settings: Settings, work: Work) -> None:
        self._accounts, self._permissions = accounts, permissions
        self._settings, self._work = settings, work

    def decision_context(
        self, tool: RegisteredTool | None, name: str, call_id: str, arguments: Any, subject: Subject
    ) -> DecisionContext:
        """Collect everything that the decision on a tool call depends on."""
        if tool is None:
            return DecisionContext(tool=name)
        definition, agent = tool.definition, subject.agent
        rule = rule_of(agent.tool_policy, name) if agent is not None else Rule()
        caller = self.caller(subject)
        checks = _check(tool, rule, arguments, self.tool_context(tool, call_id, subject, caller))
        return DecisionContext(
            tool=name,
            risk=tool.risk,
            enabled=tool.overrides.enabled,
            enabled_tools=agent.enabled_tools if agent is not None else (),
            allowed_tools=subject.allowed_tools,
            requester_is_active=caller is not None,
            permissions=caller.permissions if caller is not None else frozenset(),
            permission=definition.permission,
            sees=checks.sees,
            offered=definition.runs == "server" or self._is_offered(name, subject.worker_id),
            faults=checks.faults,
            admitted=checks.admitted,
            rule=rule,
            default_policy=tool.default_policy,
            tainted=subject.tainted and self._settings.get(TAINT_ENABLED),
            is_trusted=checks.is_trusted,
            target_asks=checks.target_asks,
            calls=subject.calls,
            max_calls=self._settings.get(MAX_CALLS),
            running=subject.running,
            max_running=MAX_RUNNING,
        )

    def tool_context(
        self, tool: RegisteredTool, call_id: str, subject: Subject, caller: Principal | None
    ) -> ToolContext:
        """Return the context in which the tool runs."""
        return ToolContext(
            caller=caller or Principal(kind="agent", id=""),
            task_id=subject.task_id,
            lease_id=subject.lease_id,
            call_id=call_id,
            config=tool.config,
            timeout_seconds=tool.timeout_seconds,
            work=self._work,
        )

    def caller(self, subject: Subject) -> Principal | None:
        """Return the agent with the current permissions of the requester, or None if the requester is no longer active.

        A task without a requester has the permissions of the role `member`.
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
            permissions=self._permissions.held_by(role),
            task_id=subject.task_id or None,
            lease_id=subject.lease_id or None,
        )

    def _is_offered(self, name: str, worker_id: str | None) -> bool:
        """Return whether a worker offers the tool. A worker that lists no tools is assumed to offer every tool."""
        if self.workers is None:
            return False
        if worker_id is None:
            return any(not each.tools or name in each.tools for each in self.workers.fleet())
        worker = self.workers.facts(worker_id)
        return worker is not None and (not worker.tools or name in worker.tools)


class _Checks(msgspec.Struct, frozen=True, kw_only=True):
    """The results of the tool's own checks, with the field names of `DecisionContext`.

    Arguments that do not match the schema are not checked further.
    """

    faults: tuple[Fault, ...] = ()
    sees: bool = True
    admitted: bool = True
    is_trusted: bool = False
    target_asks: bool = False


FAILED = object()


def _check(tool: RegisteredTool, rule: Rule, arguments: Any, context: ToolContext) -> _Checks:
    """Run the tool's own checks on the arguments."""
    definition = tool.definition
    if faults := _faults(tool, arguments):
        return _Checks(faults=tuple(faults))
    target = None if definition.target is None else _guarded(definition, definition.target, arguments)
    return _Checks(
        sees=definition.sees is None or _guarded(definition, definition.sees, context, arguments) is True,
        admitted=_is_admitted(tool, rule, arguments),
        is_trusted=definition.trusts is not None
        and _guarded(definition, definition.trusts, tool.config, arguments) is True,
        target_asks=target is FAILED or (isinstance(target, Target) and target.ask),
    )


def _guarded(tool: Tool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a plugin. Return `FAILED` if the function raises an exception."""
    try:
        return function(*arguments)
    except Exception:
        log.exception("a check of a tool raised an exception", extra={"tool": tool.name})
        return FAILED


def _faults(tool: RegisteredTool, arguments: Any) -> list[Fault]:
    """Return the parts of the arguments that do not match the schema of the tool."""
    if not isinstance(arguments, dict):
        return [Fault("/arguments", "wrong_type", "must be an object")]
    schema = tool.definition.schema
    if tool.source == "worker" and not _is_safe(msgspec.json.encode(schema)):
        return []  # the worker must check the arguments itself
    found = _guarded(tool.definition, lambda: json_schema_problems(schema, arguments, pointer_prefix="/arguments"))
    if found is FAILED:
        return [
            Fault("/arguments", "not_allowed", "the tool's schema is not valid; report this to its plugin's author")
        ]
    faults: list[Fault] = found
    return faults


def _is_admitted(tool: RegisteredTool, rule: Rule, arguments: Any) -> bool:
    """Return whether the configuration of the tool and the configuration of the agent both allow the arguments.

    The configuration of the agent can only restrict the configuration of the tool.
    """
    definition = tool.definition
    if rule.config and json_schema_problems(definition.config_schema or NO_CONFIG, dict(rule.config)):
        return False  # the tool cannot enforce a configuration that does not match its schema
    if definition.admits is None:
        return True
    configs = [tool.config] if rule.config is None else [tool.config, rule.config]
    return all(_guarded(definition, definition.admits, config, arguments) is True for config in configs)


@functools.lru_cache(maxsize=512)
def _is_safe(schema: bytes) -> bool:
    """Return whether the server can safely validate with the schema of a worker.

    The schema must be valid and small, and must not contain regular expressions.
    """
    try:
        check_user_schema(msgspec.json.decode(schema))
    except Invalid:
        return False
    return True
