"""Decides whether tool calls are allowed, and collects the facts on which a decision depends.

The decision is a pure function of its context, so checking a call leads to the same decision as making it. The context
describes the agent and the person behind the call, their permissions, and the results of validating the arguments. This
module only reads rows, in the caller's unit of work. If a check contributed by a plugin raises an exception, the call
is denied.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import FieldError, Invalid
from corral.plugin import Settings
from corral.schema.json_schema_validation import check_user_schema, json_schema_errors
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_plugins.agents.api import AgentFacts
from corral_plugins.approvals.api import Approvals
from corral_plugins.tools.api import POLICIES, CallTarget, Tool, ToolContext, ToolPolicy, ToolRisk, includes_tools
from corral_plugins.tools.service.registry import RegisteredTool
from corral_plugins.tools.settings import MAX_CALLS, TAINT_ENABLED
from corral_plugins.workers.api import Workers

TAINTED_POLICY: Mapping[ToolRisk, ToolPolicy] = {
    "read": "allow",
    "write": "allow",
    "external": "ask",
    "dangerous": "ask",
}
RISK_PERMISSION: Mapping[ToolRisk, str] = {"external": "tools.use_external", "dangerous": "tools.use_dangerous"}

SENTENCES = {
    "unknown_tool": "The tool does not exist.",
    "disabled": "The tool is disabled.",
    "changed": "The MCP server changed or added this tool. An admin must accept it first.",
    "not_enabled": "The agent may not use this tool.",
    "not_allowed_for_task": "The task does not allow this tool.",
    "requester_lacks_permission": "The requester of the task does not have the required permission.",
    "not_offered": "The worker does not offer this tool.",
    "invalid_arguments": "The arguments do not match the tool's schema.",
    "config": "The tool's configuration does not allow these arguments.",
    "policy": "The policy denies this call, or requires an approval, which is not available here.",
    "rejected": "A person rejected this call.",
    "revision_requested": "A person asked for a different call instead.",
    "expired": "Nobody decided about this call in time.",
    "cancelled": "The approval request for this call was cancelled.",
    "superseded": "The same call was made again; the outcome is stored with the later call.",
    "caps": "The attempt has used all of its tool calls, or too many calls are running.",
}


class ToolPolicyRule(msgspec.Struct, frozen=True, kw_only=True):
    """An agent's rule for a tool.

    `policy` is the policy for the tool. `when_tainted` is the policy in tainted runs. `config` further restricts the
    arguments. If a field is None, the tool's default applies.
    """

    policy: ToolPolicy | None = None
    when_tainted: ToolPolicy | None = None
    config: Mapping[str, Any] | None = None


class DecisionContext(msgspec.Struct, frozen=True, kw_only=True):
    """The facts on which the decision on a call depends, in the order in which the rules use them.

    `risk` is None if the tool does not exist.
    """

    tool: str
    risk: ToolRisk | None = None
    enabled: bool = True
    accepted: bool = True  # an admin has accepted the definition that an MCP server gives of the tool
    enabled_tools: Sequence[str] = ()
    allowed_tools: Sequence[str] | None = None
    requester_is_active: bool = True
    permissions: frozenset[str] = frozenset()  # the permissions of the requester's current role
    permission: str | None = None  # required by the tool, in addition to the permission for its risk
    is_visible: bool = True
    offered: bool = True
    faults: tuple[FieldError, ...] = ()
    admitted: bool = True
    rule: ToolPolicyRule = ToolPolicyRule()
    default_policy: ToolPolicy = "allow"
    tainted: bool = False
    is_trusted: bool = False  # the tool's configuration allows a tainted run to call this target
    target_asks: bool = False
    can_ask: bool = False  # whether people can be asked for an approval
    approved: bool = False  # people have approved this call
    calls: int = 0
    max_calls: int = 200
    running: int = 0
    max_running: int = 5


class ToolDecision(msgspec.Struct, frozen=True, kw_only=True):
    """The decision on a tool call.

    `asked` means that people must approve the call first. `reasons` lists every rule that denies the call, in order;
    the first is the main reason. `is_temporary` is true if the only reason for the denial is that too many calls are
    running.
    """

    decision: Literal["allowed", "asked", "denied"]
    reasons: tuple[str, ...] = ()
    faults: tuple[FieldError, ...] = ()
    is_temporary: bool = False

    @property
    def reason(self) -> str | None:
        """The first rule that denies the call, or None if the call is allowed."""
        return self.reasons[0] if self.reasons else None


def decide_call(context: DecisionContext) -> ToolDecision:
    """Decide whether a tool call is allowed.

    For an unknown tool, `unknown_tool` is the only reason. If the policy is `ask` but the plugin `approvals` is not
    active, the call is denied, because nobody can be asked.
    """
    if context.risk is None:
        return ToolDecision(decision="denied", reasons=("unknown_tool",))
    policy = effective_policy(context)
    denials = tuple(reason for reason, denies in _RULES if denies(context, policy))
    if denials:
        is_temporary = denials == ("caps",) and context.calls < context.max_calls
        return ToolDecision(decision="denied", reasons=denials, faults=context.faults, is_temporary=is_temporary)
    return ToolDecision(decision="asked" if policy == "ask" and not context.approved else "allowed")


def effective_policy(context: DecisionContext) -> ToolPolicy:
    """Return the strictest policy that applies to the call.

    The candidates are the agent's policy (or else the tool's), the policy for tainted runs, and the target's policy.
    """
    found = [context.rule.policy or context.default_policy]
    if context.tainted and context.risk is not None:
        trusted = context.is_trusted and context.rule.when_tainted is None
        found.append("allow" if trusted else context.rule.when_tainted or TAINTED_POLICY[context.risk])
    if context.target_asks:
        found.append("ask")
    return max(found, key=POLICIES.index)


def required_permissions(context: DecisionContext) -> frozenset[str]:
    """Return the permissions that the requester needs for the call."""
    risk = RISK_PERMISSION.get(context.risk) if context.risk is not None else None
    return frozenset(name for name in (risk, context.permission) if name is not None)


def permissions_for(tool: RegisteredTool) -> frozenset[str]:
    """Return the permissions that people need to use a tool."""
    risk = RISK_PERMISSION.get(tool.risk)
    return frozenset(name for name in (risk, tool.definition.permission) if name is not None)


def approver_permissions_for(tool: RegisteredTool) -> frozenset[str]:
    """Return the permissions that people need to approve calls to a tool."""
    more = tool.definition.approver_permission
    return permissions_for(tool) | ({more} if more is not None else frozenset())


def rule_of(policy: Mapping[str, Any], tool: str) -> ToolPolicyRule:
    """Return the rule for a tool in an agent's `tool_policy`.

    A rule with the exact name of the tool takes precedence over a `prefix.*` pattern. Among patterns, the longest takes
    precedence.
    """
    found = policy.get(tool)
    if found is None:
        prefixes = [name for name in policy if name.endswith(".*") and tool.startswith(name[:-1])]
        found = policy[max(prefixes, key=len)] if prefixes else {}
    return msgspec.convert({"policy": found} if isinstance(found, str) else found, ToolPolicyRule)


_RULES: tuple[tuple[str, Callable[[DecisionContext, ToolPolicy], bool]], ...] = (
    ("disabled", lambda context, policy: not context.enabled),
    ("changed", lambda context, policy: not context.accepted),
    ("not_enabled", lambda context, policy: not includes_tools(context.enabled_tools, [context.tool])),
    (
        "not_allowed_for_task",
        lambda context, policy: (
            context.allowed_tools is not None and not includes_tools(context.allowed_tools, [context.tool])
        ),
    ),
    (
        "requester_lacks_permission",
        lambda context, policy: (
            not context.requester_is_active
            or not required_permissions(context) <= context.permissions
            or not context.is_visible
        ),
    ),
    ("not_offered", lambda context, policy: not context.offered),
    ("invalid_arguments", lambda context, policy: bool(context.faults)),
    ("config", lambda context, policy: not context.admitted),
    (
        "policy",
        lambda context, policy: policy == "deny" or (policy == "ask" and not (context.can_ask or context.approved)),
    ),
    ("caps", lambda context, policy: context.calls >= context.max_calls or context.running >= context.max_running),
)
"""The rules for tool calls, numbered 2 to 10. Callers of `decide_call` check rule 1 (lease and kill switch) first."""


# -- the context


log = logging.getLogger("corral.tools")

MAX_RUNNING = 5
NO_CONFIG: dict[str, Any] = {"type": "object", "additionalProperties": False}


class CallSubject(msgspec.Struct, frozen=True, kw_only=True):
    """The subject of a tool call: the agent, the person who requested the task, and the run.

    `worker_id` is the id of the run's worker, or None if any online worker may run the tool.
    """

    agent: AgentFacts | None
    requester_id: str | None
    worker_id: str | None = None
    allowed_tools: Sequence[str] | None = None
    tainted: bool = False
    task_id: str = ""
    lease_id: str = ""
    cause_chain: tuple[str, ...] = ()
    fence: int = 0
    calls: int = 0
    running: int = 0


class ContextBuilder:
    """Builds the context for the decision on a call, and the context in which the tool runs."""

    approvals: Approvals | None
    workers: Workers | None

    def __init__(self, accounts: Accounts, permissions: Permissions, settings: Settings, work: Work) -> None:
        self._accounts, self._permissions = accounts, permissions
        self._settings, self._work = settings, work

    def decision_context(
        self,
        tool: RegisteredTool | None,
        name: str,
        call_id: str,
        arguments: Any,
        subject: CallSubject,
        *,
        approved: bool = False,
    ) -> DecisionContext:
        """Collect the facts on which the decision on a tool call depends.

        `approved` is true if people have approved the call.
        """
        if tool is None:
            return DecisionContext(tool=name)
        definition, agent = tool.definition, subject.agent
        rule = rule_of(agent.tool_policy, name) if agent is not None else ToolPolicyRule()
        caller = self.agent_principal(subject)
        checks = _run_tool_checks(tool, rule, arguments, self.tool_context(tool, call_id, subject, caller))
        return DecisionContext(
            tool=name,
            risk=tool.risk,
            enabled=tool.overrides.enabled,
            accepted=tool.accepted,
            enabled_tools=agent.enabled_tools if agent is not None else (),
            allowed_tools=subject.allowed_tools,
            requester_is_active=caller is not None,
            permissions=caller.permissions if caller is not None else frozenset(),
            permission=definition.permission,
            is_visible=checks.is_visible,
            offered=definition.runs == "server" or self._is_offered(name, subject.worker_id),
            faults=checks.faults,
            admitted=checks.admitted,
            rule=rule,
            default_policy=tool.default_policy,
            tainted=subject.tainted and self._settings.get(TAINT_ENABLED),
            is_trusted=checks.is_trusted,
            target_asks=checks.target_asks,
            can_ask=self.approvals is not None,
            approved=approved,
            calls=subject.calls,
            max_calls=self._settings.get(MAX_CALLS),
            running=subject.running,
            max_running=MAX_RUNNING,
        )

    def tool_context(
        self, tool: RegisteredTool, call_id: str, subject: CallSubject, caller: Principal | None
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
            cause_chain=subject.cause_chain,
        )

    def agent_principal(self, subject: CallSubject) -> Principal | None:
        """Return the agent with the current permissions of the requester, or None if the requester is no longer active.

        A task without a requester has the permissions of the role `member`.
        """
        role: str | None = "member"
        permissions = self._permissions.held_by("member")
        if subject.requester_id is not None:
            try:
                requester = self._accounts.principal_of(subject.requester_id)
            except InsufficientRights:
                return None
            role, permissions = requester.role, requester.permissions
        agent_id = subject.agent.id if subject.agent is not None else ""
        return Principal(
            kind="agent",
            id=agent_id,
            agent_id=agent_id,
            user_id=subject.requester_id,
            role=role,
            permissions=permissions,
            task_id=subject.task_id or None,
            lease_id=subject.lease_id or None,
        )

    def _is_offered(self, name: str, worker_id: str | None) -> bool:
        """Return whether the worker, or any online worker if `worker_id` is None, offers the tool."""
        if self.workers is None:
            return False
        if worker_id is None:
            return any(each.offers(name) for each in self.workers.online_workers())
        worker = self.workers.find(worker_id)
        return worker is not None and worker.offers(name)


class _ToolChecks(msgspec.Struct, frozen=True, kw_only=True):
    """The results of a tool's own checks. The fields have the same names as in `DecisionContext`.

    If the arguments do not match the schema, they are not checked further.
    """

    faults: tuple[FieldError, ...] = ()
    is_visible: bool = True
    admitted: bool = True
    is_trusted: bool = False
    target_asks: bool = False


FAILED = object()


def _run_tool_checks(tool: RegisteredTool, rule: ToolPolicyRule, arguments: Any, context: ToolContext) -> _ToolChecks:
    """Validate the arguments with the schema of the tool, and then with the tool's own checks."""
    definition = tool.definition
    if faults := schema_faults(tool, arguments):
        return _ToolChecks(faults=tuple(faults))
    target = None if definition.target is None else _call_guarded(definition, definition.target, arguments)
    asks = definition.asks is not None and _call_guarded(definition, definition.asks, context, arguments) is not False
    return _ToolChecks(
        is_visible=definition.is_visible is None
        or _call_guarded(definition, definition.is_visible, context, arguments) is True,
        admitted=_allows_arguments(tool, rule, arguments),
        is_trusted=definition.trusts is not None
        and _call_guarded(definition, definition.trusts, tool.config, arguments) is True,
        target_asks=asks or target is FAILED,
    )


def target_of(tool: RegisteredTool, arguments: Any) -> str | None:
    """Return the object on which a call acts, such as `ssh_connection:<id>`.

    Return None if the tool does not specify on which object it acts.
    """
    definition = tool.definition
    found = None if definition.target is None else _call_guarded(definition, definition.target, arguments)
    return f"{found.kind}:{found.id}" if isinstance(found, CallTarget) else None


def _call_guarded(tool: Tool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a plugin's function. Return `FAILED` if the function raises an exception."""
    try:
        return function(*arguments)
    except Exception:
        log.exception("a check of a tool raised an exception", extra={"tool": tool.name})
        return FAILED


def schema_faults(tool: RegisteredTool, arguments: Any) -> list[FieldError]:
    """Return an error for each part of the arguments that does not match the schema of the tool."""
    if not isinstance(arguments, dict):
        return [FieldError("/arguments", "wrong_type", "must be an object")]
    schema = tool.definition.schema
    if tool.is_foreign and not _is_safe_schema(msgspec.json.encode(schema)):
        return []  # the worker or the MCP server must check the arguments itself
    found = _call_guarded(tool.definition, lambda: json_schema_errors(schema, arguments, pointer_prefix="/arguments"))
    if found is FAILED:
        return [
            FieldError(
                "/arguments", "not_allowed", "the tool's schema is not valid; report this to the author of its plugin"
            )
        ]
    faults: list[FieldError] = found
    return faults


def _allows_arguments(tool: RegisteredTool, rule: ToolPolicyRule, arguments: Any) -> bool:
    """Return whether the configurations of the tool and of the agent both allow the arguments.

    The agent's configuration can only restrict the tool's configuration.
    """
    definition = tool.definition
    if rule.config and json_schema_errors(definition.config_schema or NO_CONFIG, dict(rule.config)):
        return False  # the tool cannot enforce a configuration that does not match its schema
    if definition.admits is None:
        return True
    configs = [tool.config] if rule.config is None else [tool.config, rule.config]
    return all(_call_guarded(definition, definition.admits, config, arguments) is True for config in configs)


@functools.lru_cache(maxsize=512)
def _is_safe_schema(schema: bytes) -> bool:
    """Return whether it is safe to validate arguments with a schema supplied by a worker or an MCP server.

    The schema must be valid and small, and must not contain regular expressions.
    """
    try:
        check_user_schema(msgspec.json.decode(schema))
    except Invalid:
        return False
    return True
