"""Runs for those who do something under their lease: tools look at them, taint them, end them, ask people for them."""

from __future__ import annotations

from collections.abc import Sequence

from corral.auth.principal import Principal
from corral.database.statement import Statement
from corral.errors import Conflict, NotFound
from corral_plugins.tasks.api import Run
from corral_plugins.tasks.models import Attempt
from corral_plugins.tasks.reports import AskedInput
from corral_plugins.tasks.service import rows
from corral_plugins.tasks.service.leases import Leases
from corral_plugins.tasks.service.moves import Moves
from corral_plugins.tasks.service.outcomes import Outcomes
from corral_plugins.tasks.service.rows import Ledger, Row
from corral_plugins.tasks.service.waits import check_question, wait_for_input

MAX_SOURCES = 50

_TAINTED = Statement(lambda p: Attempt.select(Attempt.tainted).where(Attempt.id == p("id")).tuples())


class Runs:
    """Joins the caller's unit."""

    def __init__(self, moves: Moves, leases: Leases, outcomes: Outcomes) -> None:
        self._moves, self._leases, self._outcomes = moves, leases, outcomes

    def run(self, task_id: str, lease_id: str | None, *, by: Principal) -> Run:
        """See `Tasks.run`."""
        row, attempt = self._leases.started(task_id, lease_id, by)
        self._leases.renew(attempt)
        self._moves.workers.alive(attempt.worker_id)
        return _run(row, attempt)

    def run_of(self, task_id: str) -> Run | None:
        """See `Tasks.run_of`."""
        row = rows.find(task_id)
        if row is None:
            return None
        return _run(row, rows.live(task_id) if row.lease_id is not None else None)

    def taint(self, task_id: str, lease_id: str, sources: Sequence[str]) -> bool:
        """See `Tasks.taint`."""
        try:
            row = rows.lock(task_id)
        except NotFound:
            return False
        known: list[str] = rows.parsed(row.taint_sources) or []
        told = list(dict.fromkeys([*known, *sources]))[:MAX_SOURCES]
        if told != known or not row.tainted:
            rows.change(row, {"tainted": True, "taint_sources": told})
        attempt = rows.of_lease(lease_id)
        if attempt is None:
            return False
        found = _TAINTED.one({"id": attempt.id})
        rows.change_attempt(attempt, tainted=True, taint_sources=told)
        return found is not None and not found[0]

    def fail(self, task_id: str, lease_id: str, *, type: str, message: str) -> None:
        """See `Tasks.fail_run`."""
        found = self._live(task_id, lease_id)
        if found is None:
            return
        row, attempt = found
        if row.status == "cancelling":
            self._outcomes.settle(row, attempt, by="tools")
        else:
            self._outcomes.fail(row, attempt, "error", type, message, by="tools")
        self._moves.signal(attempt, "lost")

    def ask(self, task_id: str, lease_id: str, asked: AskedInput, *, call_id: str) -> None:
        """The run waits for a person, whose answer is the result of its call `call_id`."""
        check_question(asked)
        found = self._live(task_id, lease_id)
        if found is None or found[0].status != "running":
            raise Conflict("Only a running task can wait for a person.", code="lease_lost")
        row, attempt = found
        wait_for_input(self._moves, row, attempt, asked, by="human.ask", call_id=call_id)
        self._moves.signal(attempt, "lost")

    @staticmethod
    def _live(task_id: str, lease_id: str) -> tuple[Row, Ledger] | None:
        try:
            row = rows.lock(task_id)
        except NotFound:
            return None
        attempt = rows.of_lease(lease_id)
        return None if attempt is None or row.lease_id != lease_id else (row, attempt)


def _run(row: Row, attempt: Ledger | None) -> Run:
    return Run(
        task_id=row.id,
        lease_id=attempt.lease_id if attempt else "",
        fence=row.fence,
        agent_id=attempt.agent_id if attempt else row.agent_id or "",
        worker_id=attempt.worker_id if attempt else "",
        requester_id=row.created_by,
        allowed_tools=rows.parsed(row.allowed_tools),
        tainted=bool(row.tainted),
    )
