"""The rules of the decision, as data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.errors import FieldError
from corral_plugins.tools.api import POLICIES, RISKS
from corral_plugins.tools.service.decision import (
    DecisionContext,
    ToolPolicyRule,
    decide_call,
    effective_policy,
    rule_of,
)

pytestmark = pytest.mark.one_engine

GOOD: dict[str, Any] = {
    "tool": "a.tool",
    "risk": "external",
    "enabled_tools": ["a.tool"],
    "permissions": frozenset({"tools.use_external", "a.write"}),
    "permission": "a.write",
}
FAULT = (FieldError("/arguments/x", "required", "this field is required"),)
ORDER: list[tuple[str, dict[str, Any]]] = [
    ("disabled", {"enabled": False}),
    ("changed", {"accepted": False}),
    ("not_enabled", {"enabled_tools": ["another.tool"]}),
    ("not_allowed_for_task", {"allowed_tools": []}),
    ("requester_lacks_permission", {"permissions": frozenset({"a.write"})}),
    ("not_offered", {"offered": False}),
    ("invalid_arguments", {"faults": FAULT}),
    ("config", {"admitted": False}),
    ("policy", {"rule": ToolPolicyRule(policy="deny")}),
    ("caps", {"calls": 200}),
]


def test_nothing_against_it_is_allowed() -> None:
    assert decide_call(DecisionContext(**GOOD)).decision == "allowed"


def test_an_unknown_tool_has_one_reason() -> None:
    assert decide_call(DecisionContext(tool="no.tool", enabled=False)).reasons == ("unknown_tool",)


@pytest.mark.parametrize(("reason", "against"), ORDER)
def test_each_rule_refuses_alone(reason: str, against: dict[str, Any]) -> None:
    assert decide_call(DecisionContext(**GOOD | against)).reasons == (reason,)


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_the_first_refusal_is_the_reason(first: int) -> None:
    against = {name: value for _, fields in ORDER[first:] for name, value in fields.items()}
    verdict = decide_call(DecisionContext(**GOOD | against))
    assert verdict.reason == ORDER[first][0]
    assert verdict.reasons == tuple(reason for reason, _ in ORDER[first:])


@pytest.mark.parametrize(
    "against",
    [
        {"requester_is_active": False},
        {"is_visible": False},
        {"permissions": frozenset({"tools.use_external"})},
        {"risk": "dangerous"},
    ],
)
def test_what_the_requester_lacks(against: dict[str, Any]) -> None:
    assert "requester_lacks_permission" in decide_call(DecisionContext(**GOOD | against)).reasons


def test_running_calls_are_a_cap_too() -> None:
    busy = decide_call(DecisionContext(**GOOD | {"running": 5}))
    assert (busy.reasons, busy.is_temporary) == (("caps",), True)
    for other in ({"running": 5, "calls": 200}, {"running": 5, "offered": False}, {"calls": 200}):
        assert not decide_call(DecisionContext(**GOOD | other)).is_temporary
    assert decide_call(DecisionContext(**GOOD | {"running": 4})).decision == "allowed"


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "allow"),
        ({"default_policy": "ask"}, "ask"),
        ({"default_policy": "deny", "rule": ToolPolicyRule(policy="allow")}, "allow"),
        ({"rule": ToolPolicyRule(policy="deny"), "tainted": True}, "deny"),
        ({"tainted": True}, "ask"),
        ({"tainted": True, "risk": "dangerous"}, "ask"),
        ({"tainted": True, "risk": "read"}, "allow"),
        ({"tainted": True, "risk": "write"}, "allow"),
        ({"tainted": True, "risk": "write", "rule": ToolPolicyRule(when_tainted="deny")}, "deny"),
        ({"tainted": True, "rule": ToolPolicyRule(when_tainted="allow")}, "allow"),
        ({"tainted": True, "rule": ToolPolicyRule(policy="ask", when_tainted="allow")}, "ask"),
        ({"tainted": True, "is_trusted": True}, "allow"),
        ({"tainted": True, "is_trusted": True, "rule": ToolPolicyRule(when_tainted="ask")}, "ask"),
        ({"tainted": True, "is_trusted": True, "default_policy": "ask"}, "ask"),
        ({"target_asks": True}, "ask"),
        ({"target_asks": True, "rule": ToolPolicyRule(policy="deny")}, "deny"),
    ],
)
def test_the_policy_is_the_strictest(fields: dict[str, Any], policy: str) -> None:
    assert effective_policy(DecisionContext(**GOOD | fields)) == policy


@given(
    policy=st.none() | st.sampled_from(POLICIES),
    default=st.sampled_from(POLICIES),
    risk=st.sampled_from(RISKS),
    trusted=st.booleans(),
    asks=st.booleans(),
)
def test_taint_never_loosens(policy: Any, default: Any, risk: Any, trusted: bool, asks: bool) -> None:
    fields = GOOD | {
        "risk": risk,
        "rule": ToolPolicyRule(policy=policy),
        "default_policy": default,
        "is_trusted": trusted,
        "target_asks": asks,
    }
    calm, tainted = (
        effective_policy(DecisionContext(**fields)),
        effective_policy(DecisionContext(**fields, tainted=True)),
    )
    assert POLICIES.index(tainted) >= POLICIES.index(calm)


def test_rules_are_found_by_name_then_by_the_longest_prefix() -> None:
    policy = {"a.*": "deny", "a.b.*": {"policy": "ask", "config": {"x": 1}}, "a.b.c": "allow"}
    assert rule_of(policy, "a.b.c") == ToolPolicyRule(policy="allow")
    assert rule_of(policy, "a.b.d") == ToolPolicyRule(policy="ask", config={"x": 1})
    assert rule_of(policy, "a.d") == ToolPolicyRule(policy="deny")
    assert rule_of(policy, "b.a") == ToolPolicyRule()
