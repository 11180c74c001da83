"""The in-memory state of a circuit breaker in one process.

A closed circuit breaker admits and counts calls without any I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from corral import clock
from corral_plugins.circuit_breakers.api import State
from corral_plugins.circuit_breakers.models import BreakerRow
from corral_plugins.circuit_breakers.service.configuration import BreakerConfig
from corral_plugins.circuit_breakers.service.transitions import CallReport
from corral_plugins.circuit_breakers.service.windows import (
    Outcome,
    exceeded_rate,
    new_window,
    reason_to_open,
    window_shape_of,
)

FORCED_SECONDS = 60.0  # the `Retry-After` of a breaker that an admin forced open
FULL_SECONDS = 0.5  # after other processes have taken all permits
MAX_PENDING = 5000  # calls; while the database cannot be reached, the oldest are forgotten
NEVER_READ = 0  # the revision of a breaker whose row is not known


class LocalBreaker:
    """The state that this process last read for a circuit breaker, and the calls that are not stored yet.

    Instances may be used only on the event loop. `probing` counts the probes of this process, including calls that are
    asking for a permit.
    """

    def __init__(self, name: str, config: BreakerConfig) -> None:
        self.name, self.config = name, config
        self.configured: Mapping[str, Any] | None = None
        self.state: State = "closed"
        self.forced = False
        self.generation, self.revision = 1, NEVER_READ
        self.retry_at = self.full_until = 0.0  # epoch seconds
        self.permits_out = self.probing = 0
        self.reason = ""
        self.window = new_window(config)
        self._pending: deque[tuple[Outcome, float]] = deque(maxlen=MAX_PENDING)
        self._rejected = self._neutral = 0
        self._last_error: dict[str, str] | None = None
        self._probes = [0, 0, 0]  # calls, failures and slow calls, while the database cannot be reached

    # -- decisions

    @property
    def passes(self) -> bool:
        """Whether calls are admitted without a permit."""
        return self.state == "closed" or not self.config.enabled

    def blocked_until(self, now: float) -> float | None:
        """Return the time until which calls are rejected, or None if a call may be admitted."""
        if self.passes:
            return None
        if self.forced:
            return now + FORCED_SECONDS
        if self.state == "open":
            return self.retry_at if now < self.retry_at else None
        permits = self.config.half_open_permits
        if self.probing >= permits or self.permits_out >= permits or now < self.full_until:
            return now + FULL_SECONDS
        return None

    # -- counting

    def count(self, outcome: Outcome | None, generation: int, last_error: dict[str, str] | None) -> bool:
        """Count a call. Return whether the circuit breaker has opened.

        `outcome` is None for a neutral call. `generation` is the breaker's generation when the call began; calls from
        earlier generations are ignored.
        """
        if generation != self.generation:
            return False
        if outcome is None:
            self._neutral += 1
            return False
        now = clock.time_s()
        self._last_error = last_error or self._last_error
        self._pending.append((outcome, now))
        self.window.add(outcome, now)
        return self._open_if_due(now)

    def _open_if_due(self, now: float) -> bool:
        if self.state != "closed":
            return False
        self.window.expire(now)
        reason = reason_to_open(self.config, self.window)
        if reason is None:
            return False
        self.state, self.reason = "open", reason
        self.retry_at = now + self.config.wait_open_seconds
        return True

    def count_rejection(self) -> None:
        """Count a rejected call."""
        self._rejected += 1

    def take_report(self) -> CallReport | None:
        """Return a report of the calls counted since the last report, or None if there were no calls."""
        if not (self._pending or self._rejected or self._neutral):
            return None
        report = CallReport(
            name=self.name,
            generation=self.generation,
            outcomes=list(self._pending),
            rejected=self._rejected,
            neutral=self._neutral,
            last_error=self._last_error,
        )
        self._pending.clear()
        self._rejected = self._neutral = 0
        self._last_error = None
        return report

    def restore_report(self, report: CallReport) -> None:
        """Add the calls of a report back to the counts, because the report could not be stored."""
        if report.generation == self.generation:
            self._pending = deque((*report.outcomes, *self._pending), maxlen=MAX_PENDING)  # the newest are kept
            self._rejected += report.rejected
            self._neutral += report.neutral
            self._last_error = self._last_error or report.last_error

    # -- the row

    def apply(self, row: BreakerRow, config: BreakerConfig) -> bool:
        """Adopt the state in the database row.

        Return whether calls that are not yet stored cause the circuit breaker to open.
        """
        if row.revision < self.revision:  # an older picture of the row
            return False
        if row.generation != self.generation:
            self._pending.clear()
            self._rejected = self._neutral = 0
        if row.generation != self.generation or row.permits_out < config.half_open_permits:
            self.full_until = 0.0
        self.config, self.configured = config, row.config
        self.state, self.forced = row.state, row.forced
        self.generation, self.revision, self.reason = row.generation, row.revision, row.reason
        self.retry_at = clock.parse_instant(row.retry_at) if row.retry_at is not None else 0.0
        self.permits_out, self._probes = row.permits_out, [0, 0, 0]
        self.window = new_window(config, row.window if row.window_shape == window_shape_of(config) else "")
        for outcome, at in self._pending:
            self.window.add(outcome, at)
        return self._open_if_due(clock.time_s())

    def configure(self, config: BreakerConfig) -> None:
        """Adopt a new configuration after the settings have changed."""
        if config != self.config:
            if window_shape_of(config) != window_shape_of(self.config):
                self.window = new_window(config)
            self.config = config

    def forget_row(self) -> None:
        """Close the circuit breaker, because its row was deleted."""
        self._close()
        self.configured, self.forced, self.revision, self.permits_out = None, False, NEVER_READ, 0
        self.generation += 1

    def _close(self) -> None:
        self.state, self.reason = "closed", ""
        self.window = new_window(self.config)
        self._pending.clear()

    # -- probes while the database cannot be reached

    def admit_without_database(self) -> bool:
        """Decide whether to admit a call as a probe while the database cannot be reached.

        Return whether the call is admitted.
        """
        if self.state == "open":
            self.state, self._probes = "half_open", [0, 0, 0]
        self.permits_out = 0
        return self.probing <= self.config.half_open_permits

    def decide_without_database(self, outcome: Outcome | None) -> None:
        """Count a probe while the database cannot be reached, and open or close the circuit breaker if necessary.

        The new state applies only to this process. As soon as the database can be reached again, the row determines the
        state.
        """
        self.revision = NEVER_READ
        if outcome is None or self.state != "half_open":
            return
        for index, is_counted in enumerate((True, outcome == "failure", outcome == "slow")):
            self._probes[index] += is_counted
        if reason := exceeded_rate(self.config, *self._probes):
            self.state, self.reason = "open", reason
            self.retry_at = clock.time_s() + self.config.wait_open_seconds
        elif self.probing <= 1:
            self._close()
