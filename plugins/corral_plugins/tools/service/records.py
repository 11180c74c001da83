"""Reading calls, judging calls that are not made, and keeping the record tidy. Joins the caller's unit."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.errors import Invalid, NotFound
from corral.http.page import Order, Page, PageQuery, newest_first, paginate
from corral.redact.redactor import Redactor
from corral_plugins.admin.api import KillSwitch
from corral_plugins.agents.api import AgentFacts, Agents
from corral_plugins.tasks.api import Run, Tasks
from corral_plugins.tools.api import Json
from corral_plugins.tools.models import ToolCall
from corral_plugins.tools.service import ledger
from corral_plugins.tools.service.cases import Cases, Subject
from corral_plugins.tools.service.decision import decide
from corral_plugins.tools.service.executions import cut_short, repeatable
from corral_plugins.tools.service.output import fitted
from corral_plugins.tools.service.registry import Registry
from corral_plugins.tools.shapes import CallQuery, CallView, Check, Checked


class Records:
    """What happened, and what would happen."""

    agents: Agents | None
    switch: KillSwitch | None
    tasks: Tasks | None

    def __init__(self, registry: Registry, cases: Cases, redactor: Redactor) -> None:
        self._registry, self._cases, self._redactor = registry, cases, redactor

    def page(self, query: CallQuery, by: Principal) -> Page[CallView]:
        """Calls of visible tasks, newest first."""
        wanted: Any = ToolCall.select().where(visible(ToolCall, by))
        if isinstance(query.agent_id, str):
            wanted = wanted.where(ToolCall.agent_id == query.agent_id.lower())
        if isinstance(query.tool, str):
            wanted = wanted.where(ToolCall.tool == query.tool)
        if isinstance(query.decision, list):
            wanted = wanted.where(ToolCall.decision.in_(query.decision))
        if isinstance(query.status, list):
            wanted = wanted.where(ToolCall.status.in_(query.status))
        if isinstance(query.since, datetime):
            wanted = wanted.where(ToolCall.created_at >= clock.from_datetime(query.since))
        return paginate(wanted, query, by, scope="tool-calls", order=newest_first(ToolCall), make=ledger.view)

    def of_task(self, task_id: str, query: PageQuery, by: Principal) -> Page[CallView]:
        """The calls of a task, oldest first; `NotFound`."""
        self._readable(task_id, by)
        wanted = ToolCall.select().where(ToolCall.task_id == task_id)
        order = (Order(ToolCall.created_at, descending=False), Order(ToolCall.id, descending=False))
        return paginate(wanted, query, by, scope=f"tool-calls:{task_id}", order=order, make=ledger.view)

    def one(self, task_id: str, call_id: str, by: Principal) -> CallView:
        """A call of a task; `NotFound`."""
        self._readable(task_id, by)
        row = ledger.find(task_id, call_id)
        if row is None:
            raise NotFound("There is no call with this id.")
        return ledger.view(row)

    def _readable(self, task_id: str, by: Principal) -> None:
        if self.tasks is None:
            raise NotFound()
        self.tasks.get(task_id, by=by)

    # -- what would happen

    def check(self, name: str, check: Check, *, by: Principal) -> Checked:
        """The verdict on a call that is not made; the agent's owner and admins ask for it."""
        agent = self.agents.facts(check.agent_id.lower()) if self.agents is not None else None
        if agent is None:
            raise Invalid.at("/agent_id", "unknown_reference", "There is no such agent.", problem="unknown_reference")
        require_owner(by, agent.owner_id, what="agent", manage="agents.manage")
        if self.switch is not None:
            self.switch.refuse_if_engaged()
        subject = self._subject(agent, check, by)
        known = self._registry.find(name, worker_id=subject.worker_id)
        if known is None:
            raise NotFound("There is no tool with this name.")
        verdict = decide(self._cases.of(known, name, "", check.arguments, subject))
        return Checked(decision=verdict.decision, reasons=list(verdict.reasons), errors=list(verdict.faults))

    def _subject(self, agent: AgentFacts, check: Check, by: Principal) -> Subject:
        """As a call of the task's run would be judged; without a task, as one for the caller on any worker."""
        tainted = check.tainted if isinstance(check.tainted, bool) else False
        if check.task_id is None:
            return Subject(agent=agent, requester_id=by.user_id, tainted=tainted)
        task_id = check.task_id.lower()
        run = self._run(task_id)
        if not isinstance(check.tainted, bool):
            tainted = run.tainted
        calls, running = ledger.count(task_id, run.fence) if run.lease_id else (0, 0)
        return Subject(
            agent=agent,
            requester_id=run.requester_id,
            worker_id=run.worker_id or None,
            allowed_tools=run.allowed_tools,
            tainted=tainted,
            task_id=task_id,
            fence=run.fence,
            calls=calls,
            running=running,
        )

    def _run(self, task_id: str) -> Run:
        run = self.tasks.run_of(task_id) if self.tasks is not None else None
        if run is None:
            raise Invalid.at("/task_id", "unknown_reference", "There is no such task.", problem="unknown_reference")
        return run

    # -- what others tell, and what time brings

    def answered(self, task_id: str, call_id: str, *, result: Any = None, error: Json | None = None) -> None:
        """See `Tools.answered`. Of what people write only stored credentials are taken out."""
        row = ledger.find(task_id, call_id)
        if row is not None and row.status == "running" and row.alive_until is None:
            status = "succeeded" if error is None else "failed"
            ledger.end(row, status, result=fitted(self._redactor.redact_json(result, patterns=False)), error=error)

    def reap(self) -> int:
        """End calls whose process died, and permits of which nothing was heard; how many."""
        found = ledger.abandoned()
        for row in found:
            if row.status == "permitted":
                ledger.end(row, "expired", error=cut_short(may_repeat=False))
            else:
                ledger.end(row, "failed", error=cut_short(repeatable(self._registry.find(row.tool))))
        return len(found)
