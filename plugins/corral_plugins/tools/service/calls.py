"""Tool calls under a lease, and the history of calls.

The first unit of work decides whether the call is allowed and stores the call. Then the tool runs. A second unit of
work stores the outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from datetime import datetime
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, FieldError, Forbidden, Invalid, NotFound, Problem
from corral.events.live_feed import Feed
from corral.http.page import Order, Page, PageQuery, newest_first, paginate
from corral.plugin import Audit, AuditEntry
from corral.redact.redactor import Redactor
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tasks.api import Run, Tasks
from corral_plugins.tools.models import ToolCallRow
from corral_plugins.tools.service import call_store
from corral_plugins.tools.service.call_permits import ToolPermits
from corral_plugins.tools.service.call_store import truncate_output
from corral_plugins.tools.service.decision import SENTENCES, CallSubject, ContextBuilder, ToolDecision, decide_call
from corral_plugins.tools.service.executions import (
    INTERRUPTED,
    UNKNOWN,
    ToolExecution,
    ToolExecutions,
    can_repeat,
    interrupted_error,
)
from corral_plugins.tools.service.held_call_outcomes import HeldResults
from corral_plugins.tools.service.held_calls import HeldCalls
from corral_plugins.tools.service.metrics import ToolMetrics
from corral_plugins.tools.service.registry import RegisteredTool, ToolRegistry
from corral_plugins.tools.shapes import CallCheckResult, ToolCallQuery, ToolCallView, UncheckedToolCall

MAX_DENIALS = 20
OUTCOMES = ("rejected", "revision_requested", "cancelled", "superseded")
"""The reasons why a call that waited for an approval can be denied.

The stored error contains the note of the person who decided.
"""
WAIT_SECONDS = 25.0
POLL_SECONDS = 2.0


class CallRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A requested tool call.

    `shown` contains the redacted arguments. `redacted` contains the redacted and truncated arguments, which are stored.
    """

    task_id: str
    lease_id: str | None
    tool: str
    call_id: str
    arguments: Any
    shown: Any
    redacted: Any
    sha256: str
    by: Principal
    entry: UnitContext
    until: float  # when the call stops waiting for other calls, in epoch seconds


class CallInProgress(msgspec.Struct, frozen=True):
    """Returned if a call cannot start yet and must wait.

    Either the same call is already running, in this or another process, or the task has too many running calls.
    """


class ToolCalls:
    """The service that makes tool calls.

    Repeating a `call_id` does not run the tool twice, because the row of the call is stored before the tool runs.
    Only an interrupted call runs again, and only if running it again is harmless.
    """

    agents: Agents | None
    audit: Audit | None
    switch: KillSwitch | None
    tasks: Tasks | None

    def __init__(
        self,
        work: Work,
        feed: Feed,
        redactor: Redactor,
        registry: ToolRegistry,
        contexts: ContextBuilder,
        executions: ToolExecutions,
        permits: ToolPermits,
        held: HeldCalls,
        results: HeldResults,
        metrics: ToolMetrics,
    ) -> None:
        self._work, self._feed, self._redactor = work, feed, redactor
        self._registry, self._contexts, self._executions = registry, contexts, executions
        self._permits, self._held, self._results, self._metrics = permits, held, results, metrics

    async def call_tool(
        self,
        task_id: str,
        tool: str,
        call_id: str,
        arguments: Any,
        *,
        lease_id: str | None,
        by: Principal,
        entry: UnitContext,
    ) -> ToolCallView:
        """Call a tool and return the call.

        A request that repeats a `call_id` waits for the first call and returns the same result. Raise `NotFound`,
        `Invalid` or `Forbidden` for a denied call, and `Conflict` if the lease ends or the call is still running.
        """
        shown = await asyncio.to_thread(self._redactor.redact_json, arguments)
        request = CallRequest(
            task_id=task_id,
            lease_id=lease_id,
            tool=tool,
            call_id=call_id,
            arguments=arguments,
            shown=shown,
            redacted=truncate_output(shown),
            sha256=arguments_hash(arguments),
            by=by,
            entry=entry,
            until=clock.time_s() + WAIT_SECONDS,
        )
        call = await self._wait_to_begin(request)
        if isinstance(call, ToolExecution):
            call = await self._executions.run_tool(call)
            if call.error is not None and call.error["type"] in (INTERRUPTED, UNKNOWN):
                raise Conflict(
                    "The lease ended during the call; stop the run and discard its results.", code="lease_lost"
                )
        if call.status == "denied":
            raise denial_error(call)
        return call

    async def _wait_to_begin(self, request: CallRequest) -> ToolExecution | ToolCallView:
        """Start the call. Wait while too many calls are running, or while the same call is already running.

        Raise `Conflict` after 25 seconds.
        """
        while True:
            with self._feed.subscribe((request.task_id,)) as notified:
                is_over = clock.time_s() >= request.until  # by then, the unit denies a call that waits for others
                found = await self._work(lambda: self._begin_call(request), entry=request.entry)
                if not isinstance(found, CallInProgress):
                    return found
                if is_over:
                    raise Conflict(
                        "This call is still running; repeat the request to wait for it.", current_status="running"
                    )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await notified.wait()

    # -- the first unit of work

    def _begin_call(self, request: CallRequest) -> ToolExecution | ToolCallView | CallInProgress:
        if self.tasks is None:
            raise NotFound("There is no task with this id.")
        run = self.tasks.lock_run(request.task_id, request.lease_id, by=request.by)
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        row = call_store.find_call(request.task_id, request.call_id)
        if row is not None:
            return self._repeat_call(request, run, row)
        tool, subject, verdict = self._decide_call(request, run)
        if verdict.is_temporary and clock.time_s() < request.until:
            return CallInProgress()
        self._metrics.count_decision(tool, verdict.decision)
        if verdict.decision == "denied":
            return self._store_denial(request, run, tool, verdict)
        assert tool is not None
        if verdict.decision == "asked":
            columns = self._call_columns(request, run)
            return self._held.hold(columns, request.arguments, request.shown, tool, run, request.by)
        return self._start_call(request, run, tool, subject)

    def _decide_call(self, request: CallRequest, run: Run) -> tuple[RegisteredTool | None, CallSubject, ToolDecision]:
        tool = self._registry.find_tool(request.tool, worker_id=run.worker_id)
        agent = self.agents.find(run.agent_id) if self.agents is not None else None
        subject = _subject_of_run(agent, run, tainted=run.tainted)
        context = self._contexts.decision_context(tool, request.tool, request.call_id, request.arguments, subject)
        return tool, subject, decide_call(context)

    def _start_call(
        self, request: CallRequest, run: Run, tool: RegisteredTool, subject: CallSubject, row: ToolCallRow | None = None
    ) -> ToolExecution | ToolCallView:
        """Start an allowed call by storing it. If `row` is given, start the next execution of that call instead.

        If the tool runs on the worker, return the call with a permit.
        """
        is_permit = tool.definition.runs == "worker"
        state: dict[str, Any] = {"status": "running", "alive_until": clock.now(call_store.ALIVE_SECONDS)}
        if is_permit:
            state = {"status": "permitted", **self._permits.permit_columns(tool)}
        if row is None:
            row = call_store.insert_call(**self._call_columns(request, run), decision="allowed", executions=1, **state)
        else:
            call_store.update_call_row(
                row,
                fence=run.fence,
                lease_id=run.lease_id,
                worker_id=run.worker_id,
                executions=row.executions + 1,
                error=None,
                created_at=clock.now(),
                finished_at=None,
                duration_ms=None,
                **state,
            )
        if is_permit:
            return self._permits.view_with_permit(row, tool)
        return ToolExecution(
            row_id=row.id,
            executions=row.executions,
            tool=tool,
            context=self._contexts.tool_context(
                tool, request.call_id, subject, self._contexts.agent_principal(subject)
            ),
            arguments=request.arguments,
            entry=msgspec.structs.replace(request.entry, cause=run.cause_chain),
        )

    @staticmethod
    def _call_columns(request: CallRequest, run: Run) -> dict[str, Any]:
        return {
            "call_id": request.call_id,
            "task_id": run.task_id,
            "fence": run.fence,
            "lease_id": run.lease_id,
            "agent_id": run.agent_id,
            "worker_id": run.worker_id,
            "requester_id": run.requester_id,
            "tool": request.tool,
            "arguments": request.redacted,
            "arguments_sha256": request.sha256,
            "tainted": run.tainted,
        }

    def _store_denial(
        self, request: CallRequest, run: Run, tool: RegisteredTool | None, verdict: ToolDecision
    ) -> ToolCallView:
        """Store the denial of a call. Fail the attempt after `MAX_DENIALS` (20) denials."""
        reason = verdict.reason or "policy"
        error: dict[str, Any] = {"type": reason, "message": SENTENCES[reason]}
        if reason == "invalid_arguments":
            faults = [msgspec.structs.asdict(fault) for fault in verdict.faults]
            error["errors"] = self._redactor.redact_json(faults)  # pointers contain names of arguments
        row = call_store.insert_call(
            **self._call_columns(request, run),
            decision="denied",
            reason=reason,
            status="denied",
            error=error,
            finished_at=clock.now(),
            duration_ms=0,
        )
        call_store.publish_call(row, run.cause_chain)
        if self.audit is not None and tool is not None and tool.risk in ("external", "dangerous"):
            details = {"task_id": run.task_id, "agent_id": run.agent_id, "reason": reason}
            entry = AuditEntry(
                action="tools.call.run",
                object_type="tool",
                object_id=request.tool,
                outcome="denied",
                code="tools.denied",
                details=details,
            )
            self.audit.record(entry)
        if call_store.count_denials(run.task_id, run.fence) >= MAX_DENIALS and self.tasks is not None:
            message = f"{MAX_DENIALS} tool calls of this attempt were denied, the last because: {SENTENCES[reason]}"
            self.tasks.fail_run(run.task_id, run.lease_id, type="too_many_denials", message=message)
        return call_store.call_view(row)

    # -- repeats

    def _repeat_call(
        self, request: CallRequest, run: Run, row: ToolCallRow
    ) -> ToolExecution | ToolCallView | CallInProgress:
        """Return the stored outcome of a call when a request repeats it.

        If the call was interrupted and repeating it is harmless, run the call again.
        """
        if row.arguments_sha256 != request.sha256 or row.tool != request.tool:
            detail = "This call_id was already used for another call; use a new call_id for each call."
            raise Invalid.at("/call_id", "not_unique", detail)
        if row.status == "pending_approval":
            return self._held.repeat(row, run, request.entry)
        tool = self._registry.find_tool(row.tool, worker_id=run.worker_id)
        if row.status == "running":
            if row.alive_until is None:
                return call_store.call_view(row)
            if row.alive_until > clock.now():
                return CallInProgress()
        elif row.status == "permitted":
            if tool is not None and self._permits.is_valid(row, run):
                return self._permits.view_with_permit(row, tool)
        elif row.status != "failed" or row.error is None or row.error["type"] != INTERRUPTED:
            return call_store.call_view(row)
        if tool is None or row.approval_id is not None or not can_repeat(tool):
            if row.status != "failed":
                error = interrupted_error(can_repeat=False)
                call_store.end_call(row, "failed", error=error, causes=run.cause_chain)
                self._results.deliver(row)
            return call_store.call_view(row)
        return self._run_again(request, run, row)

    def _run_again(
        self, request: CallRequest, run: Run, row: ToolCallRow
    ) -> ToolExecution | ToolCallView | CallInProgress:
        """Run an interrupted call again, under the current lease.

        The call is checked again, because permissions may have changed. Raise `Forbidden` if the call is now denied or
        needs an approval. The agent can then make the call under a new id, and people are asked to approve it.
        """
        tool, subject, verdict = self._decide_call(request, run)
        if verdict.is_temporary:
            return CallInProgress()
        if verdict.decision != "allowed" or tool is None:
            reason = verdict.reason or "policy"
            raise Forbidden(SENTENCES[reason], code="tools.denied", reason=reason)
        return self._start_call(request, run, tool, subject, row)

    # -- checks of calls, without running the tool

    def check_call(self, name: str, check: UncheckedToolCall, *, by: Principal) -> CallCheckResult:
        """Check whether a call would be allowed, without running the tool.

        Raise `Forbidden` unless the caller is the owner of the agent or an admin.
        """
        agent = self.agents.find(check.agent_id.lower()) if self.agents is not None else None
        if agent is None:
            raise Invalid.at(
                "/agent_id", "unknown_reference", "There is no agent with this id.", problem="unknown_reference"
            )
        require_owner(by, agent.owner_id, what="agent", manage="agents.manage")
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        is_tainted = check.tainted if isinstance(check.tainted, bool) else None
        if check.task_id is None:  # check for the caller, on any online worker
            subject = CallSubject(agent=agent, requester_id=by.user_id, tainted=is_tainted or False)
        else:
            run = self.tasks.find_run(check.task_id.lower()) if self.tasks is not None else None
            if run is None:
                raise Invalid.at(
                    "/task_id", "unknown_reference", "There is no task with this id.", problem="unknown_reference"
                )
            subject = _subject_of_run(agent, run, tainted=run.tainted if is_tainted is None else is_tainted)
        tool = self._registry.find_tool(name, worker_id=subject.worker_id)
        if tool is None:
            raise NotFound("There is no tool with this name.")
        verdict = decide_call(self._contexts.decision_context(tool, name, "", check.arguments, subject))
        return CallCheckResult(decision=verdict.decision, reasons=list(verdict.reasons), errors=list(verdict.faults))


def _subject_of_run(agent: AgentFacts | None, run: Run, *, tainted: bool) -> CallSubject:
    calls, running = call_store.count_calls(run.task_id, run.fence)
    return CallSubject(
        agent=agent,
        requester_id=run.requester_id,
        worker_id=run.worker_id or None,
        allowed_tools=run.allowed_tools,
        tainted=tainted,
        task_id=run.task_id,
        lease_id=run.lease_id,
        cause_chain=run.cause_chain,
        fence=run.fence,
        calls=calls if run.lease_id else 0,
        running=running if run.lease_id else 0,
    )


def arguments_hash(arguments: Any) -> str:
    """Return the SHA-256 hash of the canonical JSON of the arguments (sorted keys, no white space)."""
    return hashlib.sha256(msgspec.json.encode(arguments, order="sorted")).hexdigest()


def denial_error(call: ToolCallView) -> Problem:
    """Return the problem to raise for a denied call. Repeated requests get the same problem."""
    reason = call.reason or "policy"
    error = call.error or {}
    if reason == "unknown_tool":
        return NotFound(f"There is no tool named {call.tool}.")
    if reason in OUTCOMES:
        return Forbidden(error["message"], code="tools.denied", reason=reason)
    if reason == "invalid_arguments":
        faults = [FieldError(**each) for each in error.get("errors", ())]
        return Invalid(
            f"The arguments do not match the tool's schema in {len(faults)} place{'' if len(faults) == 1 else 's'}.",
            errors=faults,
        )
    return Forbidden(SENTENCES[reason], code="tools.denied", reason=reason)


# -- history


class CallHistory:
    """The stored tool calls. The methods run in the caller's unit of work."""

    tasks: Tasks | None

    def __init__(self, registry: ToolRegistry, results: HeldResults) -> None:
        self._registry, self._results = registry, results

    def list_calls(self, query: ToolCallQuery, by: Principal) -> Page[ToolCallView]:
        """List the calls that the caller may see, newest first."""
        found: Any = ToolCallRow.select().where(visible(ToolCallRow, by))
        if isinstance(query.agent_id, str):
            found = found.where(ToolCallRow.agent_id == query.agent_id.lower())
        if isinstance(query.tool, str):
            found = found.where(ToolCallRow.tool == query.tool)
        if isinstance(query.decision, list):
            found = found.where(ToolCallRow.decision.in_(query.decision))
        if isinstance(query.status, list):
            found = found.where(ToolCallRow.status.in_(query.status))
        if isinstance(query.since, datetime):
            found = found.where(ToolCallRow.created_at >= clock.from_datetime(query.since))
        return paginate(
            found, query, by, scope="tool-calls", order=newest_first(ToolCallRow), make=call_store.call_view
        )

    def list_calls_of_task(self, task_id: str, query: PageQuery, by: Principal) -> Page[ToolCallView]:
        """List the calls of a task, oldest first. Raise `NotFound` if the caller may not see the task."""
        self._require_task(task_id, by)
        found = ToolCallRow.select().where(ToolCallRow.task_id == task_id)
        order = (Order(ToolCallRow.created_at, descending=False), Order(ToolCallRow.id, descending=False))
        return paginate(found, query, by, scope=f"tool-calls:{task_id}", order=order, make=call_store.call_view)

    def get_call(self, task_id: str, call_id: str, by: Principal) -> ToolCallView:
        """Return a call of a task. Raise `NotFound` if there is no such call or the caller may not see the task."""
        self._require_task(task_id, by)
        row = call_store.find_call(task_id, call_id)
        if row is None:
            raise NotFound("This task has no tool call with this id.")
        return call_store.call_view(row)

    def _require_task(self, task_id: str, by: Principal) -> None:
        if self.tasks is None:
            raise NotFound("There is no task with this id.")
        self.tasks.get(task_id, by=by)

    def end_abandoned_calls(self) -> int:
        """End calls whose process has stopped, and permitted calls whose outcome was not reported.

        Return the number of ended calls.
        """
        found = call_store.abandoned_calls()
        for row in found:
            is_permit = row.status == "permitted"
            can_run = not is_permit and row.approval_id is None and can_repeat(self._registry.find_tool(row.tool))
            status, error = "expired" if is_permit else "failed", interrupted_error(can_run)
            run = self.tasks.find_run(row.task_id) if self.tasks is not None else None
            call_store.end_call(row, status, error=error, causes=() if run is None else run.cause_chain)
            self._results.deliver(row)
        return len(found)
