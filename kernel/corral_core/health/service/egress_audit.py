"""Records connections that the egress guard refused, and provides metrics about the guard and the redactor."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.egress.client import Egress
from corral.errors import Unavailable
from corral.plugin import Audit, AuditEntry, Metric
from corral.redact.patterns import BUILT_IN
from corral.redact.redactor import Redactor

log = logging.getLogger("corral.egress")

MOST_WAITING = 1000
REPORT_SECONDS, MAX_REPORTED = 60.0, 1000
AGAIN_SECONDS = 5.0


class EgressAudit:
    """Records refused connections in the audit log.

    The egress guard does not run in a unit of work, so the audit entries are queued and later written to the database
    in batches.
    """

    audit: Audit | None = None

    def __init__(self, egress: Egress, work: Work) -> None:
        self._work = work
        self._waiting: deque[AuditEntry] = deque(maxlen=MOST_WAITING)
        self._reported: dict[tuple[str, str], float] = {}
        self._bell = asyncio.Event()
        egress.on_refusal = self._queue_refusal

    async def write_refusals(self) -> None:
        """Write queued audit entries until cancelled, and retry failed writes. The kernel supervises this task."""
        while True:
            await self._bell.wait()
            self._bell.clear()
            some = [*self._waiting]
            self._waiting.clear()
            try:
                await self._work(lambda some=some: self._write_refusals(some), entry=UnitContext("refused connections"))  # type: ignore[misc]  # `some` is bound now
            except Unavailable:
                self._waiting.extendleft(reversed(some))
                await asyncio.sleep(AGAIN_SECONDS)
                self._bell.set()

    def _queue_refusal(self, sink: str, host: str) -> None:
        """Log a refused connection and queue its audit entry, at most once a minute for each `sink` and host.

        `sink` names the feature of Corral that tried to connect.
        """
        now = time.monotonic()
        if now - self._reported.get((sink, host), -REPORT_SECONDS) < REPORT_SECONDS:
            return
        if len(self._reported) >= MAX_REPORTED:
            self._reported.clear()
        self._reported[sink, host] = now
        log.warning("outgoing connection refused", extra={"sink": sink, "host": host})
        entry = AuditEntry(
            action="egress.connection.open",
            object_type="host",
            object_id=host[:200],
            object_name=host,
            outcome="denied",
            code="url_blocked",
            details={"sink": sink},
        )
        self._waiting.append(entry)
        self._bell.set()

    def _write_refusals(self, entries: list[AuditEntry]) -> None:
        if self.audit is not None:
            for entry in entries:
                self.audit.record(entry)


# -- metrics


SINKS = (
    "channel",
    "http_step",
    "import",
    "llm",
    "local_model",
    "mail",
    "mcp",
    "prices",
    "template_index",
    "tool",
    "trigger",
    "webhook",
)
OUTCOMES = ("answered", "blocked", "failed", "timed_out")

Series = dict[tuple[str, ...], float]


def _requests_by_outcome(egress: Egress) -> Series:
    return {labels: float(count) for labels, count in egress.requests.copy().items()}


def _count_blocked(egress: Egress) -> Series:
    return {(sink,): float(count) for (sink, outcome), count in egress.requests.copy().items() if outcome == "blocked"}


def _count_redactions(redactor: Redactor) -> Series:
    return {(kind,): float(count) for kind, count in redactor.counts.copy().items()}


def _count_redactable_values(redactor: Redactor) -> Series:
    return {(): float(redactor.values)}


METRICS = (
    Metric(
        name="corral_egress_requests_total",
        help="Number of outgoing requests.",
        kind="counter",
        labels={"sink": SINKS, "outcome": OUTCOMES},
        collect=_requests_by_outcome,
    ),
    Metric(
        name="corral_egress_blocked_total",
        help="Number of outgoing requests that the egress guard refused.",
        kind="counter",
        labels={"sink": SINKS},
        collect=_count_blocked,
    ),
    Metric(
        name="corral_redactions_total",
        help="Number of credentials redacted from text.",
        kind="counter",
        labels={"kind": sorted({"value", *(pattern.kind for pattern in BUILT_IN)})},
        collect=_count_redactions,
    ),
    Metric(
        name="corral_redactor_values",
        help="Number of credentials that are registered for redaction.",
        collect=_count_redactable_values,
    ),
)
