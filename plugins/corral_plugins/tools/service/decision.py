"""The decision on a tool call. The decision is a pure function of its context, and is the same for calls and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from corral.errors import Fault
from corral_plugins.tools.api import POLICIES, Policy, Risk

TAINTED_POLICY: Mapping[Risk, Policy] = {"read": "allow", "write": "allow", "external": "ask", "dangerous": "ask"}
RISK_PERMISSION: Mapping[Risk, str] = {"external": "tools.use_external", "dangerous": "tools.use_dangerous"}

SENTENCES = {
    "unknown_tool": "The tool does not exist.",
    "disabled": "The tool is disabled.",
    "not_enabled": "The agent may not use this tool.",
    "not_allowed_for_task": "The task does not allow this tool.",
    "requester_lacks_permission": "The requester of the task does not have the required permission.",
    "not_offered": "The worker does not offer this tool.",
    "invalid_arguments": "The arguments do not match the tool's schema.",
    "config": "The tool's configuration does not allow these arguments.",
    "policy": "The policy denies this call, or requires an approval, which is not available here.",
    "caps": "The attempt has used all of its tool calls, or too many calls are running.",
}


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """The rule of an agent for a tool.

    `policy`: the policy for the tool. `when_tainted`: the policy in tainted runs. `config`: further restrictions of the
    arguments. None means that the agent does not override the value.
    """

    policy: Policy | None = None
    when_tainted: Policy | None = None
    config: Mapping[str, Any] | None = None


class DecisionContext(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the decision on a call depends on, in the order of the rules.

    `risk`: None if the tool does not exist.
    """

    tool: str
    risk: Risk | None = None
    enabled: bool = True
    enabled_tools: Sequence[str] = ()
    allowed_tools: Sequence[str] | None = None
    requester_is_active: bool = True
    permissions: frozenset[str] = frozenset()  # the permissions of the requester's current role
    permission: str | None = None  # required by the tool, in addition to the permission for its risk
    sees: bool = True
    offered: bool = True
    faults: tuple[Fault, ...] = ()
    admitted: bool = True
    rule: Rule = Rule()
    default_policy: Policy = "allow"
    tainted: bool = False
    is_trusted: bool = False  # the tool's configuration allows a tainted run to call this target
    target_asks: bool = False
    calls: int = 0
    max_calls: int = 200
    running: int = 0
    max_running: int = 5


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The decision on a tool call.

    `reasons`: every rule that denies the call, in order; the first is the main reason.
    `is_temporary`: whether the call is denied only because too many calls are running.
    """

    decision: Literal["allowed", "denied"]
    reasons: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    is_temporary: bool = False

    @property
    def reason(self) -> str | None:
        """The first rule that denies the call, or None if the call is allowed."""
        return self.reasons[0] if self.reasons else None


def decide(context: DecisionContext) -> Verdict:
    """Decide whether a tool call is allowed.

    For an unknown tool, `unknown_tool` is the only reason. The policy `ask` denies the call, because nobody can approve
    calls.
    """
    if context.risk is None:
        return Verdict(decision="denied", reasons=("unknown_tool",))
    policy = effective_policy(context)
    denials = tuple(reason for reason, denies in _RULES if denies(context, policy))
    if denials:
        is_temporary = denials == ("caps",) and context.calls < context.max_calls
        return Verdict(decision="denied", reasons=denials, faults=context.faults, is_temporary=is_temporary)
    return Verdict(decision="allowed")


def effective_policy(context: DecisionContext) -> Policy:
    """Return the strictest policy that applies to the call.

    The candidates are the policy of the agent (or else of the tool), the policy for tainted runs, and the policy of the
    target.
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


def matches(names: Sequence[str], tool: str) -> bool:
    """Return whether a list of names and `prefix.*` patterns includes a tool."""
    return tool in names or any(name.endswith(".*") and tool.startswith(name[:-1]) for name in names)


def rule_of(policy: Mapping[str, Any], tool: str) -> Rule:
    """Return the rule for a tool from the `tool_policy` of an agent.

    A rule with the exact name wins over a `prefix.*` pattern; among patterns, the longest wins.
    """
    found = policy.get(tool)
    if found is None:
        prefixes = [name for name in policy if name.endswith(".*") and tool.startswith(name[:-1])]
        found = policy[max(prefixes, key=len)] if prefixes else {}
    return msgspec.convert({"policy": found} if isinstance(found, str) else found, Rule)


_RULES: tuple[tuple[str, Callable[[DecisionContext, Policy], bool]], ...] = (
    ("disabled", lambda context, policy: not context.enabled),
    ("not_enabled", lambda context, policy: not matches(context.enabled_tools, context.tool)),
    (
        "not_allowed_for_task",
        lambda context, policy: context.allowed_tools is not None and not matches(context.allowed_tools, context.tool),
    ),
    (
        "requester_lacks_permission",
        lambda context, policy: (
            not context.requester_is_active
            or not required_permissions(context) <= context.permissions
            or not context.sees
        ),
    ),
    ("not_offered", lambda context, policy: not context.offered),
    ("invalid_arguments", lambda context, policy: bool(context.faults)),
    ("config", lambda context, policy: not context.admitted),
    ("policy", lambda context, policy: policy != "allow"),
    ("caps", lambda context, policy: context.calls >= context.max_calls or context.running >= context.max_running),
)
"""Rules 2 to 10 for a tool call. The callers check rule 1 (the lease and the kill switch) beforehand."""
