"""The `Approvals` service, which creates approval requests, and lets other plugins read, use and cancel them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, FieldError, Forbidden, Invalid, NotFound, Problem
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Settings
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.approvals.api import (
    OPEN,
    RISKS,
    ApprovalCreated,
    ApprovalFacts,
    ApprovalRequest,
    Approvers,
    InvolvedPeople,
    NewApproval,
    Requester,
    canonical_hash,
)
from corral_plugins.approvals.models import IS_OPEN, Approval, ApproverRow
from corral_plugins.approvals.service import rows
from corral_plugins.approvals.service.eligibility import HIGH, Eligibility
from corral_plugins.approvals.service.outcomes import ApprovalOutcomes
from corral_plugins.approvals.settings import AUTO_APPROVE, DEFAULT_TTL, MAX_OPEN, REJECT_COOLDOWN
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Tools
from corral_plugins.workflows.api import Workflows

AUTO_APPROVE_JOB = "approvals.auto_approve"
PAYLOAD_LIMIT, RUBRIC_LIMIT = 256 * 1024, 16 * 1024
SHORTEST, LONGEST = 900, 2_592_000
TERMINAL = ("completed", "failed", "cancelled")


class ApprovalsService:
    """Implements `corral_plugins.approvals.api.Approvals`."""

    agents: Agents | None
    tasks: Tasks | None
    tools: Tools | None
    workflows: Workflows | None

    def __init__(self, settings: Settings, eligibility: Eligibility, outcomes: ApprovalOutcomes) -> None:
        self._settings, self._eligibility, self._outcomes = settings, eligibility, outcomes

    # -- opening

    def request(self, new: NewApproval, *, by: Principal) -> ApprovalFacts:
        check_payload(new.payload, "/payload")
        if new.rubric is not None:
            _check_size(new.rubric, RUBRIC_LIMIT, "/rubric")
        if by.task_id is not None and new.task_id is not None and new.task_id.lower() != by.task_id:
            raise Forbidden("An agent can request approvals only for the task that it is working on.")
        task_owner = self._check_task(new.task_id, by) if new.task_id is not None else None
        self._check_run(new, by)
        agent = self._named_agent(new.agent_id, by)
        if new.allow_self and not by.is_admin:
            raise Forbidden("Only admins may let requesters decide their own requests.")
        if (new.on_timeout == "escalate") != (new.escalate_to is not None):
            detail = "Set escalate_to if, and only if, on_timeout is escalate."
            raise Invalid.at("/escalate_to", "required" if new.escalate_to is None else "not_allowed", detail)
        same = ("type", "title", "description", "payload", "risk", "required_approvals", "allow_self", "editable")
        optional = ("confidence", "rubric", "on_timeout", "escalate_to")
        request = ApprovalRequest(
            **{name: getattr(new, name) for name in (*same, *optional)},
            requested_by=_requester(by, task_owner),
            task_id=new.task_id.lower() if new.task_id is not None else None,
            run_id=new.run_id.lower() if new.run_id is not None else None,
            step=new.step,
            agent_id=agent.id if agent is not None else by.agent_id,
            agent_owner_id=agent.owner_id if agent is not None else None,
            approvers=new.approvers or self._eligibility.default_approvers(new.risk, task_owner),
            expires_in_seconds=_seconds_left(new),
        )
        self._eligibility.check_approvers(request, request.approvers or Approvers())
        if new.escalate_to is not None:
            self._eligibility.check_approvers(request, new.escalate_to)
        return self.open(request, by=by)

    def _check_task(self, task_id: str, by: Principal) -> str | None:
        """Lock the task and return its owner. Raise `Invalid` if the task is hidden from the caller or has ended.

        Because of the lock, a task that ends at the same time has either ended before this check, or cancels the new
        approval when it ends.
        """
        try:
            found = self.tasks is not None and self.tasks.lock(task_id.lower())
            task = self.tasks.get(task_id.lower(), by=by) if found and self.tasks is not None else None
        except NotFound:
            task = None
        if task is None:
            detail = "There is no task with this id."
            raise Invalid.at("/task_id", "unknown_reference", detail, problem="unknown_reference")
        if task.status in TERMINAL:
            raise Invalid.at("/task_id", "not_allowed", f"The task is {task.status}; nothing waits for a decision.")
        owner: str | None = task.created_by
        return owner

    def _check_run(self, new: NewApproval, by: Principal) -> None:
        """Raise `Invalid` unless the workflow run in the request is visible to the caller and has not ended."""
        if new.run_id is None:
            if new.step is not None:
                raise Invalid.at(
                    "/step", "not_allowed", "Send run_id, the id of the workflow run to which the step belongs."
                )
            return
        run = self.workflows.find_run(new.run_id.lower()) if self.workflows is not None else None
        if run is None or not by.may("workflows.read"):
            detail = "There is no workflow run with this id."
            raise Invalid.at("/run_id", "unknown_reference", detail, problem="unknown_reference")
        if run.status in TERMINAL:
            raise Invalid.at("/run_id", "not_allowed", f"The run is {run.status}; nothing waits for a decision.")

    def _named_agent(self, agent_id: str | None, by: Principal) -> AgentFacts | None:
        """Return the agent for which the caller requests an approval.

        This is the agent named by `agent_id`, which must belong to the caller, or else the calling agent itself. Return
        None if there is neither.
        """
        wanted = agent_id.lower() if agent_id is not None else by.agent_id if by.kind == "agent" else None
        if wanted is None or self.agents is None:
            return None
        agent = self.agents.find(wanted)
        if agent is None:
            detail = "There is no agent with this id."
            raise Invalid.at("/agent_id", "unknown_reference", detail, problem="unknown_reference")
        is_own = by.agent_id == agent.id if by.kind == "agent" else by.user_id == agent.owner_id or by.is_admin
        if not is_own:
            raise Forbidden("You can request approvals only for agents that you own.")
        return agent

    def open(self, request: ApprovalRequest, *, by: Principal) -> ApprovalFacts:
        is_high_risk = request.type == "tool_call" or RISKS.index(request.risk) >= HIGH
        if request.on_timeout == "approve" and is_high_risk:
            detail = "A tool call or a request of high or critical risk cannot be approved by a timeout."
            raise Invalid.at("/on_timeout", "not_allowed", detail)
        sha256 = request.payload_sha256 or canonical_hash(request.payload)
        if request.task_id is not None:
            if self.tasks is not None:
                self.tasks.lock(request.task_id)
            known = self._find_same_request(request.task_id, sha256)
            if known is not None:
                self._take_over_repeated_call(known, request)
                return rows.facts_of(known)
            self._check_open_count(request)
        row = self._insert(request, sha256)
        rows.publish(ApprovalCreated, row, by.id, self._causes_of(by))
        if RISKS.index(request.risk) < HIGH and self._settings.get(AUTO_APPROVE):
            enqueue(AUTO_APPROVE_JOB, approval_id=row.id)
        return rows.facts_of(row, is_new=True)

    def _causes_of(self, by: Principal) -> tuple[str, ...] | None:
        """Return the ids of the triggers and tasks that led to the caller's task, or None if there are none.

        Triggers use these ids to detect loops that include approvals.
        """
        run = self.tasks.find_run(by.task_id) if self.tasks is not None and by.task_id is not None else None
        return None if run is None else run.cause_chain or None

    def _find_same_request(self, task_id: str, sha256: str) -> Approval | None:
        """Return an open or recently rejected approval for the same task and content, or None if there is none."""
        cooled = clock.now(-self._settings.get(REJECT_COOLDOWN))
        is_rejected = (Approval.status == "rejected") & (Approval.resolved_at > cooled)
        is_waiting = Approval.status.in_(OPEN) & (Approval.expires_at > clock.now())
        same = (Approval.task_id == task_id) & (Approval.payload_sha256 == sha256) & (is_waiting | is_rejected)
        found: Approval | None = Approval.select().where(same).order_by(Approval.created_at.desc()).first()
        return found

    @staticmethod
    def _take_over_repeated_call(row: Approval, request: ApprovalRequest) -> None:
        """If the request repeats a held tool call under another id, make the open approval apply to the new call."""
        held = request.tool_call
        if held is not None and row.status in OPEN and row.tool_call["id"] != held.id:
            rows.update_if_open(row, tool_call=msgspec.to_builtins(held))

    def _check_open_count(self, request: ApprovalRequest) -> None:
        """Raise `Problem` (`quota_exceeded`) if the task has too many open approvals.

        If an approver has requested a revision of a tool call and the task now calls the same tool again, cancel the
        earlier approval.
        """
        assert request.task_id is not None
        waiting = list(Approval.select().where((Approval.task_id == request.task_id) & IS_OPEN))
        if request.tool_call is not None:
            tool = request.tool_call.tool
            for row in waiting:
                is_revised = row.status == "revision_requested" and row.tool_call is not None
                if is_revised and row.tool_call["tool"] == tool:
                    self._outcomes.resolve(row, "cancelled", by=None, note="The tool was called again.")
        limit = self._settings.get(MAX_OPEN)
        if len([row for row in waiting if row.status in OPEN]) >= limit:
            detail = f"The task has {limit} open approval requests (approvals.max_open_per_task); wait for decisions."
            raise Problem(detail, code="quota_exceeded")

    def _insert(self, request: ApprovalRequest, sha256: str) -> Approval:
        now, asker = clock.now(), request.requested_by
        owner = asker.id if asker.type == "user" else asker.on_behalf_of
        needs = request.tool_call.required_permissions if request.tool_call is not None else ()
        approvers = request.approvers or self._eligibility.default_approvers(request.risk, asker.on_behalf_of, needs)
        seconds = request.expires_in_seconds or self._settings.get(DEFAULT_TTL)
        same = ("type", "title", "description", "payload", "risk", "task_id", "run_id", "step", "agent_id")
        policy = ("agent_owner_id", "required_approvals", "allow_self", "editable", "confidence", "rubric")
        row = Approval(
            id=new_id(),
            **{name: getattr(request, name) for name in (*same, *policy, "on_timeout", "step_policy")},
            payload_sha256=sha256,
            urgency=len(RISKS) - 1 - RISKS.index(request.risk),
            requester_type=asker.type,
            requester_id=asker.id,
            on_behalf_of=asker.on_behalf_of,
            owner_id=owner,
            approvers=msgspec.to_builtins(approvers),
            escalate_to=msgspec.to_builtins(request.escalate_to),
            tool_call=msgspec.to_builtins(request.tool_call),
            ttl_seconds=max(1, round(seconds)),
            expires_at=clock.now(seconds),
            reminded_at=now,
            created_at=now,
            updated_at=now,
        )
        Approval.insert(row.__data__).execute()
        add_approvers(row.id, approvers)
        return row

    # -- for the plugins that asked

    def find(self, approval_id: str) -> ApprovalFacts | None:
        row = Approval.get_or_none(Approval.id == approval_id)
        return None if row is None else rows.facts_of(row)

    def involved(self, approval_id: str) -> InvolvedPeople | None:
        row = Approval.get_or_none(Approval.id == approval_id)
        return None if row is None else self._eligibility.involved(row)

    def consume(self, approval_id: str, *, payload_sha256: str) -> Any:
        now = clock.now()
        content = (Approval.edited_sha256 == payload_sha256) | (
            Approval.edited_sha256.is_null() & (Approval.payload_sha256 == payload_sha256)
        )
        usable = (Approval.status == "approved") & Approval.consumed_at.is_null() & (Approval.expires_at > now)
        used = Approval.update(consumed_at=now, updated_at=now, version=Approval.version + 1)
        if not used.where((Approval.id == approval_id) & usable & content).execute():
            row = Approval.get_or_none(Approval.id == approval_id)
            status = "unknown" if row is None else row.status
            detail = "The approval cannot be used: it is for other content, has expired, or was already used."
            raise Conflict(detail, code="already_decided", current_status=status)
        return rows.facts_of(Approval.get_by_id(approval_id)).payload

    def record_execution(
        self, approval_id: str, *, status: str, tool_call_id: str, error: Mapping[str, Any] | None
    ) -> None:
        done = {"status": status, "tool_call_id": tool_call_id, "error": None if error is None else dict(error)}
        changed = Approval.update(execution=done, updated_at=clock.now(), version=Approval.version + 1)
        changed.where((Approval.id == approval_id) & (Approval.status == "approved")).execute()

    def resume_data(self, approval_id: str) -> dict[str, Any] | None:
        row = Approval.get_or_none(Approval.id == approval_id)
        if row is None or row.status == "pending":
            return None
        given: dict[str, Any] = {"decision": rows.facts_of(row).decision}
        if row.type != "tool_call" or self.tools is None:
            return given
        results = self.tools.results_of_held_call(row.tool_call["id"])
        return None if results is None else {**given, "tool_results": results}

    def cancel_for(self, *, task_id: str | None = None, run_id: str | None = None, reason: str) -> int:
        ids = rows.open_ids_of_task(task_id) if task_id is not None else []
        if run_id is not None:
            found = Approval.select(Approval.id).where((Approval.run_id == run_id) & Approval.status.in_(OPEN))
            ids += [row.id for row in found]
        for approval_id in ids:
            row = rows.lock(approval_id)
            if row is not None and row.status in OPEN:
                self._outcomes.resolve(row, "cancelled", by=None, note=reason)
        return len(ids)


def add_approvers(approval_id: str, approvers: Approvers) -> None:
    """Store the approvers of an approval, so that queries can find the approvals that a user may decide."""
    named = [("user", each.lower()) for each in approvers.users] + [("role", each) for each in approvers.roles]
    items = [{"approval_id": approval_id, "kind": kind, "name": name} for kind, name in dict.fromkeys(named)]
    if items:
        ApproverRow.insert_many(items).on_conflict_ignore().execute()


def check_payload(payload: Any, pointer: str) -> None:
    """Raise `Invalid` if a payload is too large."""
    _check_size(payload, PAYLOAD_LIMIT, pointer)


def _check_size(value: Any, limit: int, pointer: str) -> None:
    if len(msgspec.json.encode(value)) > limit:
        detail = f"at most {limit // 1024} KiB of JSON"
        raise Invalid(f"{pointer} is too large: {detail}.", errors=[FieldError(pointer, "too_long", detail)])


def _seconds_left(new: NewApproval) -> float | None:
    """Return the number of seconds within which people must decide, or None if the request sets no time.

    Raise `Invalid` if the time is out of bounds.
    """
    if not isinstance(new.expires_at, datetime):
        return float(new.expires_in_seconds) if isinstance(new.expires_in_seconds, int) else None
    if isinstance(new.expires_in_seconds, int):
        raise Invalid.at("/expires_in_seconds", "not_allowed", "Send either expires_at or expires_in_seconds.")
    seconds = new.expires_at.timestamp() - clock.time_s()
    if not SHORTEST <= seconds <= LONGEST:
        code = "in_the_past" if seconds <= 0 else "too_small" if seconds < SHORTEST else "too_large"
        raise Invalid.at("/expires_at", code, "The time to decide must be between 15 minutes and 30 days.")
    return seconds


def _requester(by: Principal, task_owner: str | None) -> Requester:
    """Return the requester that corresponds to the caller's credential. Workers act on behalf of the task's owner."""
    if by.kind == "agent":
        return Requester(type="agent", id=by.agent_id or by.id, on_behalf_of=by.user_id)
    if by.kind == "worker":
        return Requester(type="worker", id=by.worker_id or by.id, on_behalf_of=task_owner)
    return Requester(type="user", id=by.user_id or by.id)
