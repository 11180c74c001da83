"""Automatic approval: rules that approve requests with low or medium risk without a decision by a person."""

from __future__ import annotations

import functools
import logging
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import SYSTEM_PRINCIPAL
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Conflict, NotFound
from corral.plugin import Settings
from corral_core.expressions.api import Expressions, TemplateError
from corral_plugins.agents.api import Agents
from corral_plugins.approvals.api import RISKS
from corral_plugins.approvals.models import Approval
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.approvals.settings import AUTO_APPROVE, AutoApproveRule
from corral_plugins.tasks.api import Tasks
from corral_plugins.workflows.api import Workflows

log = logging.getLogger("corral.approvals")
ENTRY = UnitContext(label="job approvals.auto_approve", actor=SYSTEM)
ROOTS = ("payload", "agent", "task")


class RuleInput(msgspec.Struct, frozen=True):
    """The rules that may apply to an approval request, and the data for evaluating their conditions."""

    rules: list[AutoApproveRule]
    data: dict[str, Any]


class AutoApproval:
    """Applies automatic approval rules.

    Rules never apply to tainted runs, to requests with high or critical risk, or to requests that two people must
    approve.
    """

    agents: Agents | None
    expressions: Expressions | None
    tasks: Tasks | None
    workflows: Workflows | None

    def __init__(self, work: Work, settings: Settings, outcomes: ApprovalOutcomes) -> None:
        self._work, self._settings, self._outcomes = work, settings, outcomes

    def find_fault(self, rules: list[AutoApproveRule]) -> str | None:
        """Return the error in the first rule whose condition is invalid, or None if all conditions are valid.

        The text completes a sentence that begins with the name of the setting: "has the rule …, whose condition `when`
        is invalid: …". Runs in the unit of work that changes the setting. Expressions are only parsed here, not
        evaluated.
        """
        for rule in rules:
            if rule.when is None or self.expressions is None:
                continue
            if faults := self.expressions.check_expression(rule.when, roots=ROOTS, pointer=""):
                return f"has the rule {rule.id}, whose condition `when` is invalid: {faults[0].detail}"
        return None

    async def apply_rules(self, approval_id: str) -> None:
        """Approve an open request if one of the rules matches it. Conditions are evaluated outside units of work."""
        found = await self._work(functools.partial(self._read_input, approval_id), entry=ENTRY, read=True)
        for rule in found.rules:
            if await self._is_condition_met(rule, found.data):
                await self._work(functools.partial(self._approve, approval_id, rule), entry=ENTRY)
                return

    async def _is_condition_met(self, rule: AutoApproveRule, data: dict[str, Any]) -> bool:
        if rule.when is None:
            return True
        if self.expressions is None:
            return False
        try:
            return bool(await self.expressions.evaluate(rule.when, data, boolean=True))
        except TemplateError as error:
            log.warning("a rule was ignored: its condition failed", extra={"rule": rule.id, "error": error.detail})
            return False

    def _read_input(self, approval_id: str) -> RuleInput:
        row = Approval.get_or_none(Approval.id == approval_id)
        if row is None or row.status != "pending":
            return RuleInput([], {})
        agent = self.agents.find(row.agent_id) if self.agents is not None and row.agent_id is not None else None
        data = {
            "payload": row.payload,
            "agent": {} if agent is None else {"id": agent.id, "name": agent.name, "role": agent.role},
            "task": self._task_of(row),
        }
        if self._may_be_tainted(row, data["task"]):
            return RuleInput([], {})
        return RuleInput([rule for rule in self._settings.get(AUTO_APPROVE) if _may_apply(rule, row, data)], data)

    def _task_of(self, row: Approval) -> dict[str, Any]:
        if row.task_id is None or self.tasks is None:
            return {}
        try:
            task: dict[str, Any] = msgspec.to_builtins(self.tasks.get(row.task_id, by=SYSTEM_PRINCIPAL))
        except NotFound:
            return {}
        return task

    def _may_be_tainted(self, row: Approval, task: dict[str, Any]) -> bool:
        """Return whether the request may contain content from an untrusted source.

        Also return true if the request was made by an agent or a worker and names no task, because the requester could
        leave out a tainted task.
        """
        if task.get("tainted") or (row.tool_call is not None and row.tool_call["tainted"]):
            return True
        if row.requester_type in rows.MACHINES and row.task_id is None:
            return True
        run = None if row.run_id is None or self.workflows is None else self.workflows.find_run(row.run_id)
        return row.run_id is not None and (run is None or run.tainted)

    def _approve(self, approval_id: str, rule: AutoApproveRule) -> None:
        found = Approval.get_or_none(Approval.id == approval_id)
        row = None if found is None else self._outcomes.lock(found.id, found.task_id)
        if row is None or row.status != "pending" or rows.is_overdue(row):
            return
        if self._may_be_tainted(row, self._task_of(row)):  # the run may have read something in the meantime
            return
        by = f"rule:{rule.id}"
        made = {"user_id": by, "decision": "approve", "note": None, "at": clock.now()}
        decisions = [*row.decisions, {**made, "payload_sha256": rows.current_hash(row)}]
        try:
            self._outcomes.resolve(row, "approved", by=by, note=None, decisions=decisions)
        except Conflict:  # a person was faster
            return
        self._outcomes.record_audit("approve", row, by)


def _may_apply(rule: AutoApproveRule, row: Approval, data: dict[str, Any]) -> bool:
    """Return whether the rule may apply to the request. This function does not evaluate the rule's condition."""
    tool = None if row.tool_call is None else row.tool_call["tool"]
    if row.required_approvals > 1:
        return False
    if rule.tool is not None and (tool is None or not _matches(rule.tool, tool)):
        return False
    if rule.agent_id is not None and rule.agent_id.lower() != row.agent_id:
        return False
    cost = (data["task"].get("cost") or {}).get("cost_usd", 0.0)
    if rule.max_cost_usd is not None and cost > rule.max_cost_usd:
        return False
    return row.risk in RISKS[: RISKS.index(rule.max_risk) + 1]


def _matches(pattern: str, tool: str) -> bool:
    return tool.startswith(pattern[:-1]) if pattern.endswith(".*") else tool == pattern
