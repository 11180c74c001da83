"""The state machine for circuit breakers, whose states are stored in the database.

Every transition is a single guarded update of a row, which fails if the breaker's generation has changed in the
meantime. Every method runs in the caller's unit of work. A circuit breaker's row is locked before its permits, so that
units of work do not deadlock.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.database.unit import after_commit, current, locked
from corral.errors import Unavailable
from corral.events.event import SystemAlert, emit
from corral.ids import new_id
from corral_plugins.circuit_breakers.api import (
    BreakerCounts,
    CircuitClosed,
    CircuitHalfOpened,
    CircuitOpened,
    ForcedOpen,
    State,
)
from corral_plugins.circuit_breakers.models import BreakerRow, PermitRow, TransitionRow
from corral_plugins.circuit_breakers.service.configuration import BreakerConfig, BreakerDefaults
from corral_plugins.circuit_breakers.service.metrics import BreakerMetrics
from corral_plugins.circuit_breakers.service.windows import (
    Outcome,
    Window,
    exceeded_rate,
    new_window,
    reason_to_open,
    window_shape_of,
)

MAX_BREAKERS = 2000
ALERT_SECONDS = 300
BATCH_SIZE = 100
EVENTS = {"open": CircuitOpened, "half_open": CircuitHalfOpened, "closed": CircuitClosed}
EMPTY: dict[str, Any] = {"window": "", "rejected": 0, "neutral": 0}


class CallReport(msgspec.Struct, kw_only=True):
    """The calls that a process has counted for one circuit breaker since its last report."""

    name: str
    generation: int
    outcomes: list[tuple[Outcome, float]] = []
    rejected: int = 0
    neutral: int = 0
    last_error: dict[str, str] | None = None


class Admission(msgspec.Struct, frozen=True):
    """The database's decision about a call that the in-memory state did not admit.

    `permit` is the id of the permit if the call is a probe. Without a permit, the call is admitted only if the breaker
    in `row` is closed.
    """

    row: BreakerRow
    permit: str | None


class BreakerTransitions:
    """Changes the rows of circuit breakers.

    `changed` is set whenever a unit of work of this process changes a row.
    """

    def __init__(self, defaults: BreakerDefaults, metrics: BreakerMetrics) -> None:
        self.defaults, self._metrics = defaults, metrics
        self.changed = asyncio.Event()

    # -- rows

    def config_of(self, row: BreakerRow) -> BreakerConfig:
        """Return the effective configuration of a circuit breaker."""
        return self.defaults.config_of(row.name, row.config)

    def window_of(self, row: BreakerRow, config: BreakerConfig) -> Window:
        """Return a circuit breaker's window of recent calls. It is empty if the window's type or size has changed."""
        window = new_window(config, row.window if row.window_shape == window_shape_of(config) else "")
        window.expire(clock.time_s())
        return window

    def counts_of(self, row: BreakerRow) -> BreakerCounts:
        """Return the counts of a circuit breaker's recent calls or, while it is half open, of its probes."""
        if row.state == "half_open":
            calls, failures, slow = row.probe_calls, row.probe_failures, row.probe_slow
        else:
            window = self.window_of(row, self.config_of(row))
            calls, failures, slow = window.calls, window.failures, window.slow
        return BreakerCounts(
            calls=calls,
            failures=failures,
            slow=slow,
            rejected=row.rejected,
            failure_rate=_percentage(failures, calls),
            slow_rate=_percentage(slow, calls),
            neutral=row.neutral,
            permits_out=row.permits_out,
        )

    def lock(self, names: Collection[str], *, create: bool = False) -> list[BreakerRow]:
        """Lock the circuit breakers with these names, in the order of the names.

        If `create` is true, missing breakers are created, up to the maximum number of breakers.
        """
        query = BreakerRow.select().where(BreakerRow.name.in_(sorted(names))).order_by(BreakerRow.name)
        found = list(locked(query))
        missing = sorted(set(names) - {row.name for row in found}) if create else []
        if missing and (room := MAX_BREAKERS - BreakerRow.select().count()) > 0:
            new = [{"name": name, "revision": int(clock.time_s() * 1000)} for name in missing[:room]]
            BreakerRow.insert_many(new).on_conflict_ignore().execute()
            found = list(locked(query.clone()))  # a query keeps its results
        return found

    def find_forced(self, name: str) -> ForcedOpen | None:
        """Return the decision that forced the circuit breaker open, or None if it is not forced open."""
        row = BreakerRow.get_or_none((BreakerRow.name == name) & (BreakerRow.forced == True))  # noqa: E712
        if row is None or not self.config_of(row).enabled:
            return None
        query = TransitionRow.select().where(TransitionRow.name == name).order_by(TransitionRow.id.desc())
        last = query.first()  # None if retention has deleted it
        return ForcedOpen(by=last and last.by, reason=row.reason, at=last.at if last else row.opened_at)

    def update(self, row: BreakerRow, **columns: Any) -> bool:
        """Change columns of a circuit breaker, unless its state has changed in the meantime.

        Return whether the row was changed.
        """
        unchanged = (BreakerRow.name == row.name) & (BreakerRow.generation == row.generation)
        values = {**columns, "revision": BreakerRow.revision + 1}
        if not BreakerRow.update(values).where(unchanged).execute():
            return False
        for name, value in columns.items():
            setattr(row, name, value)
        row.revision += 1
        after_commit(self.changed.set)
        return True

    def transition(self, row: BreakerRow, to: State, reason: str, *, forced: bool = False, **columns: Any) -> bool:
        """Change the state of a circuit breaker, and record the transition.

        Return False if the state has changed in the meantime. Calls that began before the transition are no longer
        counted, because they belong to the previous generation.
        """
        for name, value in columns.items():
            setattr(row, name, value)
        before, counts = row.state, self.counts_of(row)
        changes = {**columns, **self._columns_of(row, to, forced=forced), "reason": reason if to != "closed" else ""}
        if not self.update(row, **changes, state=to, forced=forced, generation=row.generation + 1):
            return False
        PermitRow.delete().where(PermitRow.name == row.name).execute()
        TransitionRow.insert(
            id=new_id(),
            name=row.name,
            from_state=before,
            to_state=to,
            reason=reason,
            by=current().entry.actor.id,
            counts=msgspec.to_builtins(counts),
            at=clock.now(),
        ).execute()
        if before != to:
            event = EVENTS[to](name=row.name, from_=before, to=to, reason=reason, counts=counts)
            emit(event, object=("circuit_breaker", row.name[:80]))
            after_commit(functools.partial(self._metrics.count_transition, row.name, to))
        return True

    def _columns_of(self, row: BreakerRow, to: State, *, forced: bool) -> dict[str, Any]:
        config, now = self.config_of(row), clock.now()
        probes = {"permits_out": 0, "probe_calls": 0, "probe_failures": 0, "probe_slow": 0, "half_open_until": None}
        if to == "closed":
            return {**probes, **EMPTY, "opened_at": None, "retry_at": None, "alerted": False}
        if to == "half_open":
            return {**probes, "half_open_until": clock.now(config.half_open_max_seconds)}
        retry_at = None if forced else clock.now(config.wait_open_seconds)
        return {**probes, "opened_at": row.opened_at or now, "retry_at": retry_at}

    # -- counted calls

    def merge(self, reports: Sequence[CallReport]) -> None:
        """Store the call counts of a process. Open circuit breakers whose failure or slow-call rate is too high."""
        by_name = {report.name: report for report in reports}
        for row in self.lock(by_name, create=True):
            self._merge_report(row, by_name[row.name])

    def _merge_report(self, row: BreakerRow, report: CallReport) -> None:
        if report.generation != row.generation:
            return
        config = self.config_of(row)
        columns: dict[str, Any] = {
            "rejected": row.rejected + report.rejected,
            "neutral": row.neutral + report.neutral,
            "last_error": report.last_error or row.last_error,
        }
        reason = None
        if row.state == "closed" and report.outcomes:
            window = self.window_of(row, config)
            for outcome, at in report.outcomes:
                window.add(outcome, at)
                if reason := reason_to_open(config, window):
                    break
            columns |= {"window": window.encode(), "window_shape": window_shape_of(config)}
        if reason is None:
            self.update(row, **columns)
        else:
            self.transition(row, "open", reason, **columns)

    # -- probes

    def take_permit(self, name: str) -> Admission:
        """Decide whether to admit a call while the circuit breaker is not closed.

        The first call after the breaker's `retry_at` makes the breaker half open. Raise `Unavailable` if the breaker
        does not exist yet and there are already `MAX_BREAKERS` breakers.
        """
        found = self.lock([name], create=True)
        if not found:
            raise Unavailable(
                f"There are already {MAX_BREAKERS} circuit breakers, which is the maximum; delete some first."
            )
        row = found[0]
        self._expire_permits(row)
        if row.state == "open" and row.retry_at is not None and row.retry_at <= clock.now():
            self.transition(row, "half_open", "The waiting time is over.")
        if row.state != "half_open":
            return Admission(row, None)
        config = self.config_of(row)
        is_free = (BreakerRow.generation == row.generation) & (BreakerRow.permits_out < config.half_open_permits)
        taken = BreakerRow.update(permits_out=BreakerRow.permits_out + 1, revision=BreakerRow.revision + 1)
        if not taken.where((BreakerRow.name == name) & is_free).execute():
            return Admission(row, None)
        row.permits_out += 1
        row.revision += 1
        after_commit(self.changed.set)
        permit = new_id()
        PermitRow.insert(id=permit, name=name, expires_at=clock.now(config.wait_open_seconds)).execute()
        return Admission(row, permit)

    def return_permit(self, name: str, permit: str, outcome: Outcome | None, last_error: dict[str, str] | None) -> None:
        """Return a permit, and count its probe unless `outcome` is None.

        A permit that has expired or belongs to an earlier generation no longer exists, so returning it changes nothing.
        """
        for row in self.lock([name]):
            if PermitRow.delete().where(PermitRow.id == permit).execute():
                if last_error is not None:
                    row.last_error = last_error
                self._count_probes(row, 1, outcome)

    def renew_permits(self, permits: Collection[tuple[str, int]]) -> None:
        """Renew permits whose probes are still running.

        `permits` contains the id of each permit and its validity in seconds.
        """
        for seconds in {each for _, each in permits}:
            ids = [permit for permit, each in permits if each == seconds]
            PermitRow.update(expires_at=clock.now(seconds)).where(PermitRow.id.in_(ids)).execute()

    def _expire_permits(self, row: BreakerRow) -> None:
        expired = (PermitRow.name == row.name) & (PermitRow.expires_at < clock.now())
        if lost := PermitRow.delete().where(expired).execute():
            self._count_probes(row, lost, "failure")

    def _count_probes(self, row: BreakerRow, returned: int, outcome: Outcome | None) -> None:
        """Count completed probes, and open or close the circuit breaker if their results require it.

        The breaker opens as soon as the failure rate or the slow-call rate of the probes reaches its threshold.
        Otherwise, it closes when no more probes are in flight.
        """
        counted = 0 if outcome is None else returned
        calls = row.probe_calls + counted
        failures = row.probe_failures + (counted if outcome == "failure" else 0)
        slow = row.probe_slow + (counted if outcome == "slow" else 0)
        columns: dict[str, Any] = {
            "permits_out": row.permits_out - returned,
            "probe_calls": calls,
            "probe_failures": failures,
            "probe_slow": slow,
            "neutral": row.neutral + returned - counted,
            "last_error": row.last_error,
        }
        reason = exceeded_rate(self.config_of(row), calls, failures, slow) if calls else None
        if reason is not None:
            self.transition(row, "open", f"Probe: {reason}", **columns)
        elif calls and not columns["permits_out"]:
            self.transition(
                row, "closed", f"{calls} probes ended, {calls - failures - slow} of them successfully.", **columns
            )
        else:
            self.update(row, **columns)

    # -- timers

    def find_overdue(self) -> list[str]:
        """Return the names of circuit breakers that have expired permits or have been half open for too long."""
        now = clock.now()
        is_overdue = (BreakerRow.state == "half_open") & (BreakerRow.half_open_until < now)
        lost: Any = PermitRow.select(PermitRow.name).where(PermitRow.expires_at < now).distinct()
        overdue: Any = BreakerRow.select(BreakerRow.name).where(is_overdue)
        return sorted({name for query in (lost, overdue) for (name,) in query.limit(BATCH_SIZE).tuples()})

    def end_overdue(self, name: str) -> None:
        """Count probes with expired permits as failures. Open the circuit breaker if it was half open for too long."""
        for row in self.lock([name]):
            self._expire_permits(row)
            if row.state == "half_open" and row.half_open_until < clock.now():
                seconds = self.config_of(row).half_open_max_seconds
                self.transition(row, "open", f"The probes had no clear result within {seconds} seconds.")

    def find_unalerted(self) -> list[str]:
        """Return the names of circuit breakers that have been open or half open for over 5 minutes without an alert."""
        due = (
            (BreakerRow.state != "closed")
            & (BreakerRow.alerted == False)  # noqa: E712
            & (BreakerRow.opened_at < clock.now(-ALERT_SECONDS))
        )
        found: Any = BreakerRow.select(BreakerRow.name).where(due).limit(BATCH_SIZE).tuples()
        return [name for (name,) in found]

    def raise_alerts(self) -> None:
        """Alert admins once about each circuit breaker that has been open or half open for over 5 minutes."""
        for row in self.lock(self.find_unalerted()):
            if row.state != "closed" and not row.alerted and self.update(row, alerted=True):
                last = f" Last error: {row.last_error['type']}: {row.last_error['message']}" if row.last_error else ""
                alert = SystemAlert(
                    kind="circuit_open",
                    severity="warning",
                    title=f"The circuit breaker {row.name} has been open for 5 minutes",
                    detail=f"{row.reason}{last}",
                    object={"type": "circuit_breaker", "id": row.name},
                )
                emit(alert, object=("circuit_breaker", row.name[:80]))


def _percentage(part: int, whole: int) -> float:
    return round(part * 100 / whole, 1) if whole else 0.0
