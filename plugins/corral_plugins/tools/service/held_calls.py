"""Held calls: tool calls that run only after people have approved them.

An approval applies to one call, which it identifies by a hash of the agent, the task, the tool, the arguments and the
target. The call is checked again immediately before it runs, and the approval is marked as used in the transaction that
starts the call.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.crypto import Sealer, associated_data
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Conflict, FieldError, Invalid, Unavailable
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Audit, AuditEntry, Settings
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import Agents
from corral_plugins.approvals.api import (
    ApprovalFacts,
    ApprovalRequest,
    Approvals,
    HeldToolCall,
    Requester,
    Risk,
    tool_call_hash,
)
from corral_plugins.tasks.api import Run, Tasks
from corral_plugins.tools.api import Json, ToolRisk
from corral_plugins.tools.models import ToolCallRow
from corral_plugins.tools.service import call_store
from corral_plugins.tools.service.call_permits import ToolPermits
from corral_plugins.tools.service.decision import (
    SENTENCES,
    CallSubject,
    ContextBuilder,
    approver_permissions_for,
    decide_call,
    schema_faults,
    target_of,
)
from corral_plugins.tools.service.executions import ToolExecution, ToolExecutions
from corral_plugins.tools.service.held_call_outcomes import HeldResults, result_item
from corral_plugins.tools.service.registry import RegisteredTool, ToolRegistry
from corral_plugins.tools.settings import APPROVAL_TTL
from corral_plugins.tools.shapes import ToolCallView

JOB = "tools.run_approved"
ENTRY = UnitContext(label=f"job {JOB}", actor=SYSTEM)
LIMIT = 256 * 1024
RISKS: dict[ToolRisk, Risk] = {"read": "low", "write": "low", "external": "medium", "dangerous": "high"}


class HeldCalls:
    """Holds calls until people decide on them, and runs the approved calls."""

    agents: Agents | None
    approvals: Approvals | None
    audit: Audit | None
    switch: KillSwitch | None
    tasks: Tasks | None

    def __init__(
        self,
        work: Work,
        sealer: Sealer,
        settings: Settings,
        registry: ToolRegistry,
        contexts: ContextBuilder,
        executions: ToolExecutions,
        permits: ToolPermits,
        results: HeldResults,
    ) -> None:
        self._work, self._sealer, self._settings = work, sealer, settings
        self._registry, self._contexts, self._executions = registry, contexts, executions
        self._permits, self._results = permits, results

    # -- asking

    def hold(
        self, columns: dict[str, Any], arguments: Any, shown: Any, tool: RegisteredTool, run: Run, by: Principal
    ) -> ToolCallView:
        """Store a call and ask people to approve it. `shown` contains the redacted arguments, which people see.

        If people recently rejected the same call of the task, deny the call. Raise `Invalid` if the arguments are too
        long to be shown.
        """
        assert self.approvals is not None
        if len(msgspec.json.encode(shown)) > LIMIT:
            detail = f"People cannot approve a call with more than {LIMIT // 1024} KiB of arguments."
            raise Invalid(detail, errors=[FieldError("/arguments", "too_long", detail)])
        row_id, target = new_id(), target_of(tool, arguments)
        agent = self.agents.find(run.agent_id) if self.agents is not None else None
        request = ApprovalRequest(
            type="tool_call",
            title=f"Call {tool.name}",
            description=f"The agent {agent.name if agent else run.agent_id} asks to call {tool.name}.",
            payload=shown,
            payload_sha256=_approval_hash(run.agent_id, run.task_id, tool.name, arguments, target),
            risk=RISKS[tool.risk],
            requested_by=Requester(type="agent", id=run.agent_id, on_behalf_of=run.requester_id),
            task_id=run.task_id,
            agent_id=run.agent_id,
            agent_owner_id=agent.owner_id if agent is not None else None,
            editable=shown == arguments,  # whoever edits redacted arguments would replace what they cannot see
            expires_in_seconds=self._settings.get(APPROVAL_TTL),
            tool_call=HeldToolCall(
                id=row_id,
                call_id=columns["call_id"],
                tool=tool.name,
                target=target,
                tainted=run.tainted,
                taint_sources=run.taint_sources,
                required_permissions=sorted(approver_permissions_for(tool)),
            ),
        )
        asked = self.approvals.open(request, by=by)
        if asked.status != "pending":
            return self._deny_recently_rejected(row_id, columns, asked, run)
        if not asked.is_new:
            self._end_repeated(asked.id, run)
        row = call_store.insert_call(
            **columns,
            id=row_id,
            decision="asked",
            status="pending_approval",
            executions=1,
            approval_id=asked.id,
            held_arguments=None if columns["arguments"] == arguments else self._seal(row_id, arguments),
        )
        self._audit_hold(tool, run, asked.id)
        return call_store.call_view(row)

    @staticmethod
    def _deny_recently_rejected(row_id: str, columns: dict[str, Any], asked: ApprovalFacts, run: Run) -> ToolCallView:
        """Store a call with the status `denied`, because people recently rejected the same call."""
        error = _outcome_error(asked.status, asked.note)
        ended = {"status": "denied", "finished_at": clock.now(), "duration_ms": 0, "approval_id": asked.id}
        row = call_store.insert_call(
            **columns, id=row_id, decision="asked", reason=asked.status, error=error, executions=1, **ended
        )
        call_store.publish_call(row, run.cause_chain)
        return call_store.call_view(row)

    @staticmethod
    def _end_repeated(approval_id: str, run: Run) -> None:
        """End the earlier call that waits for the same approval.

        The agent has made the same call again under a new id.
        """
        held = (ToolCallRow.approval_id == approval_id) & (ToolCallRow.status == "pending_approval")
        for row in ToolCallRow.select().where(held):
            error = _outcome_error("superseded", None)
            call_store.end_call(row, "denied", error=error, reason="superseded", causes=run.cause_chain)

    def _audit_hold(self, tool: RegisteredTool, run: Run, approval_id: str) -> None:
        if self.audit is None or tool.risk not in ("external", "dangerous"):
            return
        details = {"task_id": run.task_id, "agent_id": run.agent_id, "approval_id": approval_id, "tainted": run.tainted}
        entry = AuditEntry(action="tools.call.hold", object_type="tool", object_id=tool.name, details=details)
        self.audit.record(entry)

    # -- after the decision

    def approval_changed(self, row_id: str, status: str, note: str | None) -> None:
        """Continue a held call after people have decided on it. Implements `Tools.approval_changed`."""
        row = ToolCallRow.get_or_none(ToolCallRow.id == row_id)
        if row is None or row.status != "pending_approval":
            return
        if status != "approved":
            ended = "expired" if status == "expired" else "denied"
            run = self.tasks.find_run(row.task_id) if self.tasks is not None else None
            causes = () if run is None else run.cause_chain
            call_store.end_call(row, ended, error=_outcome_error(status, note), reason=status, causes=causes)
            self._results.deliver(row)
        elif self._runs_on_worker(row):
            self._results.resume(row, [])
        else:
            call_store.update_call_row(row, approved_at=clock.now())
            enqueue(JOB, call_row_id=row.id)

    def results_of(self, row_id: str) -> list[Json] | None:
        """Return the results with which a task continues. Implements `Tools.results_of_held_call`."""
        row = ToolCallRow.get_or_none(ToolCallRow.id == row_id)
        if row is None or row.status == "permitted":
            return []
        if row.status == "pending_approval":
            return [] if self._runs_on_worker(row) else None
        return None if row.status == "running" else [result_item(row)]

    def target_of(self, row_id: str, arguments: Any, pointer: str) -> str | None:
        """Return the object on which a call with edited arguments would act. Implements `Tools.target_of_held_call`."""
        row = ToolCallRow.get_or_none(ToolCallRow.id == row_id)
        tool = None if row is None else self._registry.find_tool(row.tool, worker_id=row.worker_id)
        if tool is None:
            raise Invalid.at(pointer, "not_allowed", "The tool does not exist any more.")
        if faults := schema_faults(tool, arguments):
            moved = [
                FieldError(pointer + each.pointer.removeprefix("/arguments"), each.code, each.detail) for each in faults
            ]
            raise Invalid(
                f"The payload does not match the tool's schema in {len(moved)} place{'' if len(moved) == 1 else 's'}.",
                errors=moved,
            )
        return target_of(tool, arguments)

    def _runs_on_worker(self, row: ToolCallRow) -> bool:
        tool = self._registry.find_tool(row.tool, worker_id=row.worker_id)
        return tool is not None and tool.definition.runs == "worker"

    # -- running

    async def run_approved(self, row_id: str) -> None:
        """Run an approved tool on the server, unless it has already run.

        A call that cannot run now is retried later.
        """
        try:
            execution = await self._work(lambda: self._begin(row_id), entry=ENTRY)
        except (Conflict, Unavailable):  # the task does not wait yet, or the kill switch is engaged
            return
        if execution is not None:
            await self._executions.run_approved(execution)

    @staticmethod
    def approved_rows() -> list[str]:
        """Return the ids of at most 50 approved calls that have not run yet."""
        held = (ToolCallRow.status == "pending_approval") & ToolCallRow.approved_at.is_null(False)
        return [row.id for row in ToolCallRow.select(ToolCallRow.id).where(held).limit(50)]

    def _begin(self, row_id: str) -> ToolExecution | None:
        row = ToolCallRow.get_or_none(ToolCallRow.id == row_id)
        if row is None or row.status != "pending_approval" or self.tasks is None or self.approvals is None:
            return None
        self.tasks.lock(row.task_id)
        facts = self.approvals.find(row.approval_id)
        row = call_store.find_call_by_id(row_id)
        if row.status != "pending_approval" or facts is None:
            return None
        if facts.expires_at > clock.now():
            run = self.tasks.lock_held_run(row.task_id, row.lease_id, approval_id=row.approval_id)
            if self.switch is not None:
                self.switch.refuse_if_engaged()
            found = self._start(row, run, facts, ENTRY)
            return found if isinstance(found, ToolExecution) else None
        self._end(row, "expired", "expired", self.tasks.find_run(row.task_id))
        return None

    def repeat(self, row: ToolCallRow, run: Run, entry: UnitContext) -> ToolExecution | ToolCallView:
        """Handle a request that repeats a held call.

        If people have approved the call, start it; otherwise, return the call unchanged.
        """
        assert self.approvals is not None
        facts = self.approvals.find(row.approval_id or "")
        lease = {"lease_id": run.lease_id, "fence": run.fence, "worker_id": run.worker_id}
        if row.lease_id != run.lease_id:
            call_store.update_call_row(row, **lease)
        if facts is None or facts.status != "approved":
            return call_store.call_view(row)
        if facts.expires_at <= clock.now():
            return self._end(row, "expired", "expired", run)
        return self._start(row, run, facts, entry)

    def _start(
        self, row: ToolCallRow, run: Run, facts: ApprovalFacts, entry: UnitContext
    ) -> ToolExecution | ToolCallView:
        """Check an approved call again, and start it.

        For an `async def` tool or a worker's tool, this method marks the approval as used. For a `def` tool, the
        approval is marked as used in the unit of work that runs the tool.
        """
        assert self.approvals is not None
        tool = self._registry.find_tool(row.tool, worker_id=row.worker_id)
        arguments = facts.payload if facts.is_edited else self._original_arguments(row)
        agent = self.agents.find(row.agent_id) if self.agents is not None else None
        subject = CallSubject(
            agent=agent,
            requester_id=run.requester_id,
            worker_id=row.worker_id,
            allowed_tools=run.allowed_tools,
            tainted=run.tainted,
            task_id=row.task_id,
            lease_id=row.lease_id,
            cause_chain=run.cause_chain,
            fence=row.fence,
        )
        context = self._contexts.decision_context(tool, row.tool, row.call_id, arguments, subject, approved=True)
        verdict = decide_call(context)
        if verdict.decision != "allowed" or tool is None:
            return self._end(row, "denied", verdict.reason or "policy", run)
        sha256 = _approval_hash(row.agent_id, row.task_id, row.tool, arguments, target_of(tool, arguments))
        if tool.definition.runs == "worker":
            self.approvals.consume(facts.id, payload_sha256=sha256)
            call_store.update_call_row(row, status="permitted", **self._permits.permit_columns(tool))
            view = self._permits.view_with_permit(row, tool)
            view.approved_arguments = arguments if facts.is_edited else msgspec.UNSET
            return view
        if inspect.iscoroutinefunction(tool.definition.run):
            self.approvals.consume(facts.id, payload_sha256=sha256)
            call_store.update_call_row(row, status="running", alive_until=clock.now(call_store.ALIVE_SECONDS))
        caller = self._contexts.agent_principal(subject)
        return ToolExecution(
            row_id=row.id,
            executions=row.executions,
            tool=tool,
            context=self._contexts.tool_context(tool, row.call_id, subject, caller),
            arguments=arguments,
            entry=msgspec.structs.replace(entry, cause=run.cause_chain),
            approval_id=facts.id,
            payload_sha256=sha256,
        )

    def _end(self, row: ToolCallRow, status: str, reason: str, run: Run | None) -> ToolCallView:
        """End an approved call that is no longer allowed to run, and let its task continue."""
        causes = () if run is None else run.cause_chain
        call_store.end_call(row, status, error=_outcome_error(reason, None), reason=reason, causes=causes)
        self._results.deliver(row)
        return call_store.call_view(row)

    # -- the original arguments

    def _seal(self, row_id: str, arguments: Any) -> str:
        return self._sealer.encrypt(msgspec.json.encode(arguments), aad=_associated_data(row_id)).hex()

    def _original_arguments(self, row: ToolCallRow) -> Any:
        if row.held_arguments is None:
            return row.arguments
        return msgspec.json.decode(
            self._sealer.decrypt(bytes.fromhex(row.held_arguments), aad=_associated_data(row.id))
        )


def _associated_data(row_id: str) -> str:
    return associated_data("tools_calls", row_id, 1, "held_arguments")


def _approval_hash(agent_id: str, task_id: str, tool: str, arguments: Any, target: str | None) -> str:
    return tool_call_hash(agent_id=agent_id, task_id=task_id, tool=tool, arguments=arguments, target=target)


def _outcome_error(outcome: str, note: str | None) -> dict[str, Any]:
    """Return the error for a call that people did not approve. The error contains their note for the model."""
    message = SENTENCES[outcome] + (f" They wrote: {note}" if note else "")
    return {"type": outcome, "message": message}
