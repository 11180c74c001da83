"""The workflow step `approval`. The run waits until people decide, and then follows the path for the outcome."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

from corral.errors import FieldError
from corral.events.log import LoggedEvent
from corral_plugins.approvals.api import (
    OPEN,
    RISKS,
    ApprovalRequest,
    Approvals,
    Approvers,
    DecidingRole,
    OnTimeout,
    Requester,
)
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.eligibility import HIGH, Eligibility
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.workflows.api import Json, StepContext, StepFailure, StepResult, StepType, StepWait

GOTO = re.compile(r"goto:([a-z0-9][a-z0-9_-]{0,63})")
ON_TIMEOUT: Mapping[str, OnTimeout] = {
    "reject": "reject",
    "approve": "approve",
    "skip": "reject",
    "escalate": "escalate",
}
PEOPLE: Json = {
    "type": "object",
    "properties": {
        "users": {"type": "array", "items": {"type": "string", "format": "uuid"}, "maxItems": 50},
        "roles": {"type": "array", "items": {"enum": list(get_args(DecidingRole))}, "maxItems": 2},
    },
    "additionalProperties": False,
}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 200},
        "description": {"type": "string", "maxLength": 16384},
        "payload": {"description": "The content that people approve."},
        "risk": {"enum": list(RISKS)},
        "approvers": PEOPLE,
        "required_approvals": {"type": "integer", "minimum": 1, "maximum": 10},
        "expires_in_seconds": {"type": "integer", "minimum": 900, "maximum": 2_592_000},
        "on_reject": {
            "type": "string",
            "pattern": f"^(fail|skip|{GOTO.pattern})$",
            "patternErrorMessage": "fail, skip, or goto: and the name of a step, such as goto:cleanup",
            "description": "Whether the step fails or is skipped, or which later step runs next.",
        },
        "on_timeout": {"enum": ["reject", "approve", "skip", "escalate"]},
        "escalate_to": PEOPLE,
    },
    "required": ["title"],
    "additionalProperties": False,
}
OUTPUT: Json = {
    "type": "object",
    "properties": {
        "decision": {"type": "string"},
        "by": {"type": ["string", "null"]},
        "note": {"type": ["string", "null"]},
        "payload": {},
    },
    "required": ["decision", "by", "note", "payload"],
}


class ApprovalStep:
    """Implements the approval step. Every method runs in the caller's unit of work."""

    def __init__(self, approvals: Approvals, eligibility: Eligibility, outcomes: ApprovalOutcomes) -> None:
        self._approvals, self._eligibility, self._outcomes = approvals, eligibility, outcomes

    def dispatch(self, context: StepContext) -> StepWait:
        """Request an approval, and let the step wait for the decision."""
        config, risk = context.config, context.config.get("risk", "medium")
        approvers = config.get("approvers")
        escalate = config.get("on_timeout") == "escalate"
        owner = context.caller.user_id
        optional = ("description", "payload", "required_approvals", "expires_in_seconds")
        request = ApprovalRequest(
            type="workflow_step",
            title=config["title"],
            **{name: config[name] for name in optional if name in config},
            risk=risk,
            requested_by=Requester(type="workflow", id=context.run_id, on_behalf_of=owner),
            run_id=context.run_id,
            step=context.name,
            approvers=Approvers(**approvers) if approvers else self._eligibility.default_approvers(risk, owner),
            on_timeout=ON_TIMEOUT[config.get("on_timeout", "reject")],
            escalate_to=Approvers(**config.get("escalate_to", {"roles": ["admin"]})) if escalate else None,
            step_policy={name: config[name] for name in ("on_reject", "on_timeout") if name in config},
        )
        self._eligibility.check_approvers(request, request.approvers or Approvers())
        asked = self._approvals.open(request, by=context.caller)
        return StepWait(waits_for=asked.id, status="waiting", person=True)

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        """Return the result of the step when its approval is resolved, or None while the approval is open.

        If the request was not approved, the step fails, is skipped, or jumps to another step, as `on_reject` specifies.
        If it expired and `on_timeout` is `skip`, the step is skipped. Raise `StepFailure` if the step fails.
        """
        row = rows.lock(event.object_id)
        if row is None or row.status in OPEN:
            return None
        facts, policy = rows.facts_of(row), row.step_policy or {}
        output = {"decision": facts.status, "by": facts.by, "note": facts.note, "payload": facts.payload}
        if facts.status == "approved":
            return StepResult(output=output)
        if facts.status == "expired" and policy.get("on_timeout") == "skip":
            return StepResult(status="skipped", reason="Nobody decided in time.")
        path = policy.get("on_reject", "fail")
        if path == "skip":
            return StepResult(status="skipped", reason=facts.note or f"The request was {facts.status}.")
        if goto := GOTO.fullmatch(path):
            return StepResult(output=output, goto=goto[1])
        message = f"The request was {facts.status}." + (f" Note: {facts.note}" if facts.note else "")
        raise StepFailure(facts.status, message, kind="rejected", retryable=False)

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        """Cancel the approval request of a cancelled step."""
        row = rows.lock(context.waits_for) if context.waits_for is not None else None
        if row is not None and row.status in OPEN:
            self._outcomes.resolve(row, "cancelled", by=None, note=reason or "The run was cancelled.")
        return True


def check_config(config: Json) -> list[FieldError]:
    """Return those errors in a configuration that a check against its schema does not find."""
    faults = []
    risk = config.get("risk", "medium")
    if config.get("on_timeout") == "approve" and risk in RISKS and RISKS.index(risk) >= HIGH:
        detail = "An approval of high or critical risk cannot be granted by a timeout."
        faults.append(FieldError("/on_timeout", "not_allowed", detail))
    if "escalate_to" in config and config.get("on_timeout") != "escalate":
        faults.append(
            FieldError("/escalate_to", "not_allowed", "Set on_timeout to `escalate`, or leave out this field.")
        )
    return faults


def gotos_of(config: Json) -> Mapping[str, str]:
    """Return the later step to which the run jumps after a rejection, keyed by the JSON pointer of `on_reject`."""
    found = GOTO.fullmatch(str(config.get("on_reject", "")))
    return {"/on_reject": found[1]} if found else {}


class ApprovalStepType:
    """The step type `approval`. The plugin creates this object before the services are available."""

    implementation: ApprovalStep | None = None

    @property
    def _step(self) -> ApprovalStep:
        if self.implementation is None:
            raise StepFailure("unavailable", "The server is starting; try again.")
        return self.implementation

    def definition(self) -> StepType:
        """Return the step type."""
        return StepType(
            type="approval",
            title="Ask people for an approval",
            schema=SCHEMA,
            output_schema=OUTPUT,
            dispatch=lambda context: self._step.dispatch(context),
            resolve=lambda context, event: self._step.resolve(context, event),
            cancel=lambda context, reason: self._step.cancel(context, reason),
            check=check_config,
            gotos=gotos_of,
            waits=True,
        )
