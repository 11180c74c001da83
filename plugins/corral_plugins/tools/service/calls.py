"""The path of a call: one unit that judges and writes its row, the tool, one unit that writes how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Fault, Forbidden, Invalid, NotFound, Problem
from corral.events.feed import Feed
from corral.plugin import Audit, AuditEntry
from corral.redact.redactor import Redactor
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import Agents
from corral_plugins.tasks.api import Run, Tasks
from corral_plugins.tools.models import ToolCall
from corral_plugins.tools.service import ledger
from corral_plugins.tools.service.cases import Cases, Subject
from corral_plugins.tools.service.decision import SENTENCES, Verdict, decide
from corral_plugins.tools.service.executions import INTERRUPTED, UNKNOWN, Begun, Executions, cut_short, repeatable
from corral_plugins.tools.service.figures import Figures
from corral_plugins.tools.service.output import fitted
from corral_plugins.tools.service.permits import Permits
from corral_plugins.tools.service.registry import Known, Registry
from corral_plugins.tools.shapes import CallView

MAX_DENIALS = 20
WAIT_SECONDS = 25.0
LOOK_SECONDS = 2.0


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A call as it came. `redacted` are the arguments as they are kept."""

    task_id: str
    lease_id: str | None
    tool: str
    call_id: str
    arguments: Any
    redacted: Any
    sha256: str
    by: Principal
    entry: Entry
    until: float  # so long a call may wait for its turn


class Busy(msgspec.Struct, frozen=True):
    """The call runs already, here or elsewhere; or it waits until fewer calls of its task run."""


class Calls:
    """Tool calls under a lease. Exactly one execution a `call_id`: the row is there before the tool runs."""

    agents: Agents | None
    audit: Audit | None
    switch: KillSwitch | None
    tasks: Tasks | None

    def __init__(
        self,
        work: Work,
        feed: Feed,
        redactor: Redactor,
        registry: Registry,
        cases: Cases,
        executions: Executions,
        permits: Permits,
        figures: Figures,
    ) -> None:
        self._work, self._feed, self._redactor = work, feed, redactor
        self._registry, self._cases, self._executions = registry, cases, executions
        self._permits, self._figures = permits, figures

    async def call(
        self,
        task_id: str,
        tool: str,
        call_id: str,
        arguments: Any,
        *,
        lease_id: str | None,
        by: Principal,
        entry: Entry,
    ) -> CallView:
        """Call a tool; a repeat waits for the first and gets its answer. Raises the problem of a refusal."""
        redacted = fitted(await asyncio.to_thread(self._redactor.redact_json, arguments))
        asked = Asked(
            task_id=task_id,
            lease_id=lease_id,
            tool=tool,
            call_id=call_id,
            arguments=arguments,
            redacted=redacted,
            sha256=digest(arguments),
            by=by,
            entry=entry,
            until=clock.time_s() + WAIT_SECONDS,
        )
        found = await self._begin_or_wait(asked)
        if isinstance(found, Begun):
            found = await self._executions.run(found)
            if found.error is not None and found.error["type"] in (INTERRUPTED, UNKNOWN):
                raise Conflict("The lease ended during the call; stop and discard.", code="lease_lost")
        if found.status == "denied":
            raise refusal(found)
        return found

    async def _begin_or_wait(self, asked: Asked) -> Begun | CallView:
        """Begin, when it is its turn; of a call that runs, the end."""
        while True:
            with self._feed.waiting((asked.task_id,)) as rung:
                found = await self._work(lambda: self._begin(asked), entry=asked.entry)
                if not isinstance(found, Busy):
                    return found
                if clock.time_s() >= asked.until:
                    raise Conflict("This call is still running; ask for it again.", current_status="running")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await rung.wait()

    # -- unit 1

    def _begin(self, asked: Asked) -> Begun | CallView | Busy:
        if self.tasks is None:
            raise NotFound()
        run = self.tasks.run(asked.task_id, asked.lease_id, by=asked.by)
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        row = ledger.find(asked.task_id, asked.call_id)
        if row is not None:
            return self._again(asked, run, row)
        known, subject, verdict = self._judged(asked, run)
        if verdict.passes and clock.time_s() < asked.until:
            return Busy()
        self._figures.decided(known, verdict.decision)
        if verdict.decision == "denied":
            return self._deny(asked, run, known, verdict)
        assert known is not None
        values = self._columns(asked, run) | {"decision": "allowed"}
        if known.tool.runs == "worker":
            row = ledger.insert(**values, status="permitted", executions=1, **self._permits.terms(known))
            return self._permits.shown(row)
        row = ledger.insert(**values, status="running", executions=1, alive_until=clock.now(ledger.ALIVE_SECONDS))
        return self._begun(asked, row, known, subject)

    def _judged(self, asked: Asked, run: Run) -> tuple[Known | None, Subject, Verdict]:
        known = self._registry.find(asked.tool, worker_id=run.worker_id)
        calls, running = ledger.count(run.task_id, run.fence)
        subject = Subject(
            agent=self.agents.facts(run.agent_id) if self.agents is not None else None,
            requester_id=run.requester_id,
            worker_id=run.worker_id,
            allowed_tools=run.allowed_tools,
            tainted=run.tainted,
            task_id=run.task_id,
            lease_id=run.lease_id,
            fence=run.fence,
            calls=calls,
            running=running,
        )
        return known, subject, decide(self._cases.of(known, asked.tool, asked.call_id, asked.arguments, subject))

    @staticmethod
    def _columns(asked: Asked, run: Run) -> dict[str, Any]:
        return {
            "call_id": asked.call_id,
            "task_id": run.task_id,
            "fence": run.fence,
            "lease_id": run.lease_id,
            "agent_id": run.agent_id,
            "worker_id": run.worker_id,
            "requester_id": run.requester_id,
            "tool": asked.tool,
            "arguments": asked.redacted,
            "arguments_sha256": asked.sha256,
            "tainted": run.tainted,
        }

    def _begun(self, asked: Asked, row: ToolCall, known: Known, subject: Subject) -> Begun:
        context = self._cases.context(known, asked.call_id, subject, self._cases.caller(subject))
        return Begun(
            row_id=row.id,
            executions=row.executions,
            known=known,
            context=context,
            arguments=asked.arguments,
            entry=asked.entry,
        )

    def _deny(self, asked: Asked, run: Run, known: Known | None, verdict: Verdict) -> CallView:
        """Keep the refusal; too many of them end the attempt."""
        reason = verdict.reason or "policy"
        error: dict[str, Any] = {"type": reason, "message": SENTENCES[reason]}
        if reason == "invalid_arguments":
            error["errors"] = [msgspec.structs.asdict(fault) for fault in verdict.faults]
        row = ledger.insert(
            **self._columns(asked, run),
            decision="denied",
            reason=reason,
            status="denied",
            error=error,
            finished_at=clock.now(),
            duration_ms=0,
        )
        ledger.tell(row)
        if self.audit is not None and known is not None and known.risk in ("external", "dangerous"):
            details = {"task_id": run.task_id, "agent_id": run.agent_id, "reason": reason}
            entry = AuditEntry(
                action="tools.call.run",
                object_type="tool",
                object_id=asked.tool,
                outcome="denied",
                code="tools.denied",
                details=details,
            )
            self.audit.record(entry)
        if ledger.denials(run.task_id, run.fence) >= MAX_DENIALS and self.tasks is not None:
            told = f"{MAX_DENIALS} tool calls of this attempt were denied; the last because: {SENTENCES[reason]}"
            self.tasks.fail_run(run.task_id, run.lease_id, type="too_many_denials", message=told)
        return ledger.view(row)

    # -- repeats

    def _again(self, asked: Asked, run: Run, row: ToolCall) -> Begun | CallView | Busy:
        """The stored outcome; or the call anew, if it was cut short and a second time does no harm."""
        if row.arguments_sha256 != asked.sha256 or row.tool != asked.tool:
            told = "This call_id was used for another call; every call has its own."
            raise Invalid.at("/call_id", "not_unique", told)
        known = self._registry.find(row.tool, worker_id=run.worker_id)
        if row.status == "running":
            if row.alive_until is None:
                return ledger.view(row)
            if row.alive_until > clock.now():
                return Busy()
        elif row.status == "permitted":
            if self._permits.is_good(row, run):
                return self._permits.shown(row)
        elif row.status != "failed" or row.error is None or row.error["type"] != INTERRUPTED:
            return ledger.view(row)
        if known is None or not repeatable(known):
            if row.status != "failed":
                ledger.end(row, "failed", error=cut_short(may_repeat=False))
            return ledger.view(row)
        return self._anew(asked, run, row)

    def _anew(self, asked: Asked, run: Run, row: ToolCall) -> Begun | CallView | Busy:
        """Judged again, since rights may have changed; for the lease that asks now."""
        known, subject, verdict = self._judged(asked, run)
        if verdict.passes:
            return Busy()
        if verdict.decision == "denied" or known is None:
            reason = verdict.reason or "policy"
            raise Forbidden(SENTENCES[reason], code="tools.denied", reason=reason)
        mine: dict[str, Any] = {
            "fence": run.fence,
            "lease_id": run.lease_id,
            "worker_id": run.worker_id,
            "executions": row.executions + 1,
            "error": None,
            "created_at": clock.now(),
            "finished_at": None,
            "duration_ms": None,
        }
        if known.tool.runs == "worker":
            ledger.change(row, **mine, status="permitted", **self._permits.terms(known))
            return self._permits.shown(row)
        ledger.change(row, **mine, status="running", alive_until=clock.now(ledger.ALIVE_SECONDS))
        return self._begun(asked, row, known, subject)


def digest(arguments: Any) -> str:
    """SHA-256 over canonical JSON: sorted keys, no white space."""
    return hashlib.sha256(msgspec.json.encode(arguments, order="sorted")).hexdigest()


def refusal(call: CallView) -> Problem:
    """The problem that tells of a denied call, first time and every time."""
    reason = call.reason or "policy"
    error = call.error or {}
    if reason == "unknown_tool":
        return NotFound(f"There is no tool {call.tool}.")
    if reason == "invalid_arguments":
        faults = [Fault(**each) for each in error.get("errors", ())]
        return Invalid(f"{len(faults)} places of the arguments do not match the tool's schema.", errors=faults)
    return Forbidden(SENTENCES[reason], code="tools.denied", reason=reason)
