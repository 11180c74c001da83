"""The decision on a tool call: a function of data, the same for calls and for checks. Nothing is read here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from corral.errors import Fault
from corral_plugins.tools.api import POLICIES, Policy, Risk

RISK_POLICY: Mapping[Risk, Policy] = {"read": "allow", "write": "allow", "external": "allow", "dangerous": "ask"}
TAINTED_POLICY: Mapping[Risk, Policy] = {"read": "allow", "write": "allow", "external": "ask", "dangerous": "ask"}
RISK_PERMISSION: Mapping[Risk, str] = {"external": "tools.use_external", "dangerous": "tools.use_dangerous"}

SENTENCES = {
    "unknown_tool": "There is no such tool.",
    "disabled": "The tool is disabled.",
    "not_enabled": "The agent may not use this tool.",
    "not_allowed_for_task": "The task does not allow this tool.",
    "requester_lacks_permission": "The person this is done for may not do that.",
    "not_offered": "The worker does not offer this tool.",
    "invalid_arguments": "The arguments do not match the tool's schema.",
    "config": "The tool's configuration does not admit these arguments.",
    "policy": "The policy forbids this call, or wants a person to be asked, whom nobody can ask here.",
    "caps": "The attempt has used up its tool calls, or too many of them run at once.",
}


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent says about a tool."""

    policy: Policy | None = None
    when_tainted: Policy | None = None
    config: Mapping[str, Any] | None = None


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision depends on, in the order of the rules. `risk` None: there is no such tool."""

    tool: str
    risk: Risk | None = None
    enabled: bool = True
    enabled_tools: Sequence[str] = ()
    allowed_tools: Sequence[str] | None = None
    requester_is_active: bool = True
    permissions: frozenset[str] = frozenset()  # of the requester's role now
    permission: str | None = None  # that the tool needs beside the one of its risk
    sees: bool = True
    offered: bool = True
    faults: tuple[Fault, ...] = ()
    admitted: bool = True
    rule: Rule = Rule()
    default_policy: Policy = "allow"
    tainted: bool = False
    is_trusted: bool = False  # the target of a tainted run's call is one that needs no question
    target_asks: bool = False
    calls: int = 0
    max_calls: int = 200
    running: int = 0
    max_running: int = 5


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`reasons`: every rule that refuses, in their order; the first is the reason.

    `passes`: it is denied only because too many calls run at this moment.
    """

    decision: Literal["allowed", "denied"]
    reasons: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    passes: bool = False

    @property
    def reason(self) -> str | None:
        """Why it is denied."""
        return self.reasons[0] if self.reasons else None


def decide(case: Case) -> Verdict:
    """The verdict. An unknown tool has no other reason: nothing else is known of it.

    A question needs somebody to answer it: without approvals `ask` denies.
    """
    if case.risk is None:
        return Verdict(decision="denied", reasons=("unknown_tool",))
    policy = policy_of(case)
    refusals = tuple(reason for reason, refuses in _RULES if refuses(case, policy))
    if refusals:
        passes = refusals == ("caps",) and case.calls < case.max_calls
        return Verdict(decision="denied", reasons=refusals, faults=case.faults, passes=passes)
    return Verdict(decision="allowed")


def policy_of(case: Case) -> Policy:
    """The agent's policy, else the tool's; then the strictest of that, of what taint asks for, and of the target's."""
    found = [case.rule.policy or case.default_policy]
    if case.tainted and case.risk is not None:
        trusted = case.is_trusted and case.rule.when_tainted is None
        found.append("allow" if trusted else case.rule.when_tainted or TAINTED_POLICY[case.risk])
    if case.target_asks:
        found.append("ask")
    return max(found, key=POLICIES.index)


def needed(case: Case) -> frozenset[str]:
    """The permissions that the requester must hold."""
    risk = RISK_PERMISSION.get(case.risk) if case.risk is not None else None
    return frozenset(name for name in (risk, case.permission) if name is not None)


def names_it(names: Sequence[str], tool: str) -> bool:
    """Whether the names (or `prefix.*`) include a tool."""
    return tool in names or any(name.endswith(".*") and tool.startswith(name[:-1]) for name in names)


def rule_of(policy: Mapping[str, Any], tool: str) -> Rule:
    """What an agent's `tool_policy` says of a tool: under its name, else under the longest `prefix.*`."""
    found = policy.get(tool)
    if found is None:
        fitting = [name for name in policy if name.endswith(".*") and tool.startswith(name[:-1])]
        found = policy[max(fitting, key=len)] if fitting else {}
    return msgspec.convert({"policy": found} if isinstance(found, str) else found, Rule)


_RULES: tuple[tuple[str, Callable[[Case, Policy], bool]], ...] = (
    ("disabled", lambda case, policy: not case.enabled),
    ("not_enabled", lambda case, policy: not names_it(case.enabled_tools, case.tool)),
    (
        "not_allowed_for_task",
        lambda case, policy: case.allowed_tools is not None and not names_it(case.allowed_tools, case.tool),
    ),
    (
        "requester_lacks_permission",
        lambda case, policy: not case.requester_is_active or not needed(case) <= case.permissions or not case.sees,
    ),
    ("not_offered", lambda case, policy: not case.offered),
    ("invalid_arguments", lambda case, policy: bool(case.faults)),
    ("config", lambda case, policy: not case.admitted),
    ("policy", lambda case, policy: policy != "allow"),
    ("caps", lambda case, policy: case.calls >= case.max_calls or case.running >= case.max_running),
)
"""Rules 2 to 10 of a call; rule 1 (lease and kill switch) is answered before, by whoever knows them."""
