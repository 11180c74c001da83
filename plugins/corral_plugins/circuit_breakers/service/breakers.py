"""The `Breakers` service, which guards calls with in-memory circuit breakers and synchronises them with stored rows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

from corral import clock
from corral.database.engine import Database
from corral.database.statement import Statement
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Unavailable
from corral.events.live_feed import wait_and_clear
from corral.events.log import LoggedEvent
from corral.redact.redactor import Redactor
from corral_plugins.circuit_breakers.api import CircuitOpen, ForcedOpen, Judge, State, judge_outcome
from corral_plugins.circuit_breakers.models import BreakerRow
from corral_plugins.circuit_breakers.service.configuration import OTHER, BreakerDefaults, GuardedNames
from corral_plugins.circuit_breakers.service.local_state import NEVER_READ, LocalBreaker
from corral_plugins.circuit_breakers.service.metrics import BreakerMetrics
from corral_plugins.circuit_breakers.service.transitions import MAX_BREAKERS, BreakerTransitions
from corral_plugins.circuit_breakers.service.windows import Outcome
from corral_plugins.circuit_breakers.shapes import NAME

log = logging.getLogger("corral.circuit_breakers")
T = TypeVar("T")

SYNC_SECONDS = 0.5
MAX_ERROR = 500  # characters
READ_BATCH = 100
ENTRY = UnitContext(label="circuit_breakers.sync", actor=SYSTEM)

_REVISIONS = Statement(lambda p: BreakerRow.select(BreakerRow.name, BreakerRow.revision).tuples())
_VALID_NAME = re.compile(NAME)


class BreakersService:
    """Implements `Breakers`. Each process has one instance."""

    def __init__(
        self,
        database: Database,
        redactor: Redactor,
        names: GuardedNames,
        defaults: BreakerDefaults,
        transitions: BreakerTransitions,
        metrics: BreakerMetrics,
    ) -> None:
        self._database, self._redactor, self._names, self._defaults = database, redactor, names, defaults
        self._transitions, self._metrics = transitions, metrics
        self._breakers: dict[str, LocalBreaker] = {}
        self._permits: dict[str, tuple[int, float]] = {}  # id -> validity in seconds, and when it must be renewed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._syncing = asyncio.Lock()
        self._known_defaults: dict[str, Any] | None = None

    # -- the service

    def declare(
        self, prefix: str, names: Callable[[], Iterable[str]] | None = None, *, slow_call_seconds: int | None = None
    ) -> None:
        self._names.declare(prefix, names, slow_call_seconds=slow_call_seconds)
        self._known_defaults = None
        self._metrics.allow_kind(prefix)

    def state(self, name: str) -> State:
        breaker = self._breakers.get(name)
        return "closed" if breaker is None or breaker.passes else breaker.state

    def blocked_until(self, name: str) -> str | None:
        breaker = self._breakers.get(name)
        until = None if breaker is None else breaker.blocked_until(clock.time_s())
        return None if until is None else clock.format_instant(until)

    def is_forced(self, name: str) -> bool:
        breaker = self._breakers.get(name)
        return breaker is not None and breaker.forced and not breaker.passes

    def find_forced(self, name: str) -> ForcedOpen | None:
        return self._transitions.find_forced(name)

    def open_breakers(self) -> dict[str, str]:
        """Return the reason for the current state of each circuit breaker that is not closed, keyed by name."""
        return {name: each.reason for name, each in sorted(self._breakers.items()) if not each.passes}

    async def guard(self, name: str, call: Callable[[], Awaitable[T]], *, judge: Judge = judge_outcome) -> T:
        breaker = self._breaker(name)
        permit = None if breaker.passes else await self._take_permit(breaker)
        generation, began = breaker.generation, clock.time_s()
        try:
            result = await call()
        except Exception as error:
            await self._end_call(breaker, permit, generation, self._outcome(breaker, judge(error), began), error)
            raise
        except BaseException:  # cancelled: the permit goes back although nobody waits for that
            outcome: Outcome | None = "slow" if self._is_slow(breaker, began) else None
            self._start(self._end_call(breaker, permit, generation, outcome, None))
            raise
        outcome = self._outcome(breaker, judge(result), began)
        if permit is None:
            self._count(breaker, generation, outcome, None)
        else:
            await self._end_call(breaker, permit, generation, outcome, None)
        return result

    # -- calls

    def _breaker(self, name: str) -> LocalBreaker:
        """Return the circuit breaker with this name.

        Invalid names, and new names beyond the maximum number of circuit breakers, share the breaker `<prefix>:other`.
        """
        breaker = self._breakers.get(name)
        if breaker is None:
            if len(self._breakers) >= MAX_BREAKERS or not _VALID_NAME.match(name):
                name = f"{name.partition(':')[0]}:{OTHER}"
            breaker = self._breakers.get(name)
            if breaker is None:
                breaker = self._breakers[name] = LocalBreaker(name, self._defaults.config_of(name, None))
        return breaker

    @staticmethod
    def _is_slow(breaker: LocalBreaker, began: float) -> bool:
        return clock.time_s() - began > breaker.config.slow_call_duration_seconds

    def _outcome(self, breaker: LocalBreaker, verdict: str, began: float) -> Outcome | None:
        if verdict == "success":
            return "slow" if self._is_slow(breaker, began) else "success"
        return "failure" if verdict == "failure" else None

    async def _end_call(
        self,
        breaker: LocalBreaker,
        permit: str | None,
        generation: int,
        outcome: Outcome | None,
        error: Exception | None,
    ) -> None:
        last_error = None
        if outcome == "failure" and error is not None:
            text = self._redactor.redact(str(error)[: 2 * MAX_ERROR])[:MAX_ERROR]
            last_error = {"type": type(error).__name__, "message": text, "at": clock.now()}
        if permit is None:
            self._count(breaker, generation, outcome, last_error)
            return
        task = self._start(self._return_permit(breaker, permit, outcome, last_error))
        await asyncio.shield(task)

    def _count(
        self, breaker: LocalBreaker, generation: int, outcome: Outcome | None, last_error: dict[str, str] | None
    ) -> None:
        self._metrics.count_call(breaker.name, outcome or "neutral")
        if breaker.count(outcome, generation, last_error):
            self._transitions.changed.set()  # the row must learn of it now

    # -- permits

    async def _take_permit(self, breaker: LocalBreaker) -> str | None:
        """Return the id of a permit for a probe, or None if the circuit breaker has closed.

        Raise `CircuitOpen` if the call is rejected. Most calls are rejected without I/O: the number of calls that ask
        the database at the same time is limited to the number of permits.
        """
        if breaker.blocked_until(clock.time_s()) is not None or breaker.probing >= breaker.config.half_open_permits:
            self._reject(breaker)
        breaker.probing += 1  # before the task begins, so that other calls of this moment are rejected
        asking = self._start(self._ask_for_permit(breaker))
        try:
            permit = await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._start(self._return_unused_permit(breaker, asking))
            raise
        if permit is None and not breaker.passes:
            self._reject(breaker)
        return permit

    async def _ask_for_permit(self, breaker: LocalBreaker) -> str | None:
        """Ask the database for a permit.

        Return None if no permit is available. In this case, the call no longer counts as a probe.
        """
        permit: str | None = None
        try:
            admission = await self._database.work(lambda: self._transitions.take_permit(breaker.name), entry=ENTRY)
            self._apply(breaker, admission.row)
            permit = admission.permit
        except Unavailable:
            permit = ALONE if breaker.admit_without_database() else None
        finally:
            if permit is None:
                breaker.probing -= 1
        if permit not in (None, ALONE):
            seconds = breaker.config.wait_open_seconds
            self._permits[permit] = (seconds, clock.time_s() + seconds / 3)
        elif permit is None and breaker.state == "half_open":
            breaker.full_until = clock.time_s() + SYNC_SECONDS
        return permit

    async def _return_unused_permit(self, breaker: LocalBreaker, asking: asyncio.Task[str | None]) -> None:
        """Give back the permit of a caller that was cancelled while it was waiting for the permit."""
        if (permit := await asking) is not None:
            await self._return_permit(breaker, permit, None, None)

    async def _return_permit(
        self, breaker: LocalBreaker, permit: str, outcome: Outcome | None, last_error: dict[str, str] | None
    ) -> None:
        self._metrics.count_call(breaker.name, outcome or "neutral")
        self._permits.pop(permit, None)
        try:
            if permit == ALONE:
                breaker.decide_without_database(outcome)
                return
            await self._database.work(
                lambda: self._transitions.return_permit(breaker.name, permit, outcome, last_error), entry=ENTRY
            )
            await self._read_rows([breaker.name])
        except Unavailable:
            breaker.decide_without_database(outcome)
        finally:
            breaker.probing -= 1

    def _reject(self, breaker: LocalBreaker) -> NoReturn:
        now = clock.time_s()
        breaker.count_rejection()
        self._metrics.count_rejection(breaker.name)
        until = breaker.blocked_until(now) or now + SYNC_SECONDS
        raise CircuitOpen(breaker.name, retry_at=clock.format_instant(until))

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- keeping in step with the rows

    async def run(self) -> None:
        """Report calls and read changed rows every 0.5 s, and immediately after the state of a circuit breaker changes.

        Runs until cancelled.
        """
        while True:
            await wait_and_clear(self._transitions.changed, SYNC_SECONDS)
            try:
                await self.sync()
            except Unavailable as problem:
                log.debug("circuit breakers not synchronised", extra={"detail": problem.detail})

    async def stop(self) -> None:
        """Wait until all permits have been returned, and store the remaining call counts."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Unavailable):
            await self._store_reports()

    def on_events(self, events: Iterable[LoggedEvent]) -> None:
        """Let `run` read the stored states immediately if a circuit breaker has changed its state in any process."""
        if any(event.type.startswith("circuit.") for event in events):
            self._transitions.changed.set()

    async def sync(self) -> None:
        """Store the call counts of this process, renew its permits, and read the circuit breakers that have changed."""
        async with self._syncing:  # a row that is read while its report is on the way lacks these calls
            await self._store_reports()
            await self._renew_permits()
            await self._read_changes()

    async def _renew_permits(self) -> None:
        now = clock.time_s()
        if due := {permit: seconds for permit, (seconds, at) in self._permits.items() if at <= now}:
            await self._database.work(lambda: self._transitions.renew_permits(due.items()), entry=ENTRY)
            self._permits |= {
                permit: (seconds, now + seconds / 3) for permit, seconds in due.items() if permit in self._permits
            }

    async def _store_reports(self) -> None:
        reports = [report for each in self._breakers.values() if (report := each.take_report()) is not None]
        for start in range(0, len(reports), READ_BATCH):
            batch = reports[start : start + READ_BATCH]
            try:
                await self._database.work(lambda batch=batch: self._transitions.merge(batch), entry=ENTRY)  # type: ignore[misc]  # bound now
            except BaseException:
                for report in reports[start:]:
                    self._breakers[report.name].restore_report(report)
                raise

    async def _read_changes(self) -> None:
        revisions = dict(await self._database.read(lambda: _REVISIONS.rows({}), ENTRY))
        changed = [name for name, revision in revisions.items() if self._known_revision(name) != revision]
        await self._read_rows(changed)
        for name, breaker in self._breakers.items():
            if name not in revisions and breaker.revision != NEVER_READ:
                breaker.forget_row()
                self._known_defaults = None
        self._apply_defaults()

    def _apply_defaults(self) -> None:
        """Apply the settings to all circuit breakers if the settings have changed."""
        if (defaults := self._defaults.values()) != self._known_defaults:
            self._known_defaults = defaults
            for name, breaker in self._breakers.items():
                breaker.configure(self._defaults.config_of(name, breaker.configured))

    def _known_revision(self, name: str) -> int:
        breaker = self._breakers.get(name)
        return NEVER_READ if breaker is None else breaker.revision

    async def _read_rows(self, names: list[str]) -> None:
        for start in range(0, len(names), READ_BATCH):
            some = BreakerRow.name.in_(names[start : start + READ_BATCH])
            rows = await self._database.read(lambda some=some: list(BreakerRow.select().where(some)), ENTRY)  # type: ignore[misc]  # bound now
            for row in rows:
                breaker = self._breakers.get(row.name)
                if breaker is None:
                    breaker = self._breakers[row.name] = LocalBreaker(
                        row.name, self._defaults.config_of(row.name, row.config)
                    )
                self._apply(breaker, row)

    def _apply(self, breaker: LocalBreaker, row: BreakerRow) -> None:
        if breaker.apply(row, self._transitions.config_of(row)):
            self._transitions.changed.set()


ALONE = "alone"
"""A placeholder for the id of a permit while the database cannot be reached."""
