"""The windows of recent calls from which the rates of a circuit breaker are computed.

Counting a call takes constant time.
"""

from __future__ import annotations

from collections import deque
from typing import Literal, Protocol

import msgspec

from corral_plugins.circuit_breakers.service.configuration import BreakerConfig

Outcome = Literal["success", "failure", "slow"]
MAX_BUCKETS = 60  # of a time window; a longer window has wider buckets

_LETTERS: dict[Outcome, str] = {"success": "s", "failure": "f", "slow": "l"}
_OUTCOMES: dict[str, Outcome] = {letter: outcome for outcome, letter in _LETTERS.items()}


class Window(Protocol):
    """The number of recent calls, and how many of them failed or were slow."""

    calls: int
    failures: int
    slow: int

    def add(self, outcome: Outcome, at: float) -> None:
        """Count a call that ended at the time `at`, in seconds since the epoch."""

    def expire(self, now: float) -> None:
        """Discard calls that are too old."""

    def encode(self) -> str:
        """Encode the window as text."""


class CountWindow:
    """A window that contains the last `size` calls."""

    def __init__(self, size: int, text: str = "") -> None:
        self.calls = self.failures = self.slow = 0
        self._size = size
        self._outcomes: deque[Outcome] = deque()
        for letter in text:
            self.add(_OUTCOMES[letter], 0.0)

    def add(self, outcome: Outcome, at: float) -> None:
        if self.calls == self._size:
            self._count(self._outcomes.popleft(), -1)
        self._outcomes.append(outcome)
        self._count(outcome, 1)

    def _count(self, outcome: Outcome, change: int) -> None:
        self.calls += change
        if outcome == "failure":
            self.failures += change
        elif outcome == "slow":
            self.slow += change

    def expire(self, now: float) -> None:
        """Do nothing, because a call leaves this window only when a newer call replaces it."""

    def encode(self) -> str:
        return "".join(_LETTERS[outcome] for outcome in self._outcomes)


class _Bucket(msgspec.Struct, array_like=True):
    """The call counts of one part of a time window. The part begins at `start`."""

    start: int
    calls: int = 0
    failures: int = 0
    slow: int = 0


class TimeWindow:
    """The call counts of the last `seconds` seconds, kept in at most 60 buckets."""

    def __init__(self, seconds: int, text: str = "") -> None:
        self.calls = self.failures = self.slow = 0
        self._seconds, self._width = seconds, max(1, seconds // MAX_BUCKETS)
        self._buckets = deque(msgspec.json.decode(text, type=list[_Bucket]) if text else ())
        for bucket in self._buckets:
            self._count(bucket, 1)

    def add(self, outcome: Outcome, at: float) -> None:
        start = int(at) // self._width * self._width
        if not self._buckets or self._buckets[-1].start < start:  # the clock of another process may be behind
            self.expire(at)
            self._buckets.append(_Bucket(start))
        one = _Bucket(start, 1, int(outcome == "failure"), int(outcome == "slow"))
        self._count(one, 1)
        bucket = self._buckets[-1]
        bucket.calls += 1
        bucket.failures += one.failures
        bucket.slow += one.slow

    def _count(self, bucket: _Bucket, sign: int) -> None:
        self.calls += sign * bucket.calls
        self.failures += sign * bucket.failures
        self.slow += sign * bucket.slow

    def expire(self, now: float) -> None:
        while self._buckets and self._buckets[0].start + self._width <= now - self._seconds:
            self._count(self._buckets.popleft(), -1)

    def encode(self) -> str:
        return msgspec.json.encode(list(self._buckets)).decode()


def window_shape_of(config: BreakerConfig) -> str:
    """Return the format of the window, such as `count:20`. Calls stored in a different format are ignored."""
    return f"{config.window_type}:{config.window_size}"


def new_window(config: BreakerConfig, text: str = "") -> Window:
    """Return a window with the calls in `text`, an earlier result of `Window.encode`, or an empty window."""
    make = CountWindow if config.window_type == "count" else TimeWindow
    return make(config.window_size, text)


def exceeded_rate(config: BreakerConfig, calls: int, failures: int, slow: int) -> str | None:
    """Return a sentence about the rate that has reached its threshold, or None if no rate has reached it."""
    if failures * 100 >= config.failure_rate_threshold * calls:
        return f"{failures} of {calls} calls failed."
    if slow * 100 >= config.slow_call_rate_threshold * calls:
        return f"{slow} of {calls} calls took longer than {config.slow_call_duration_seconds} seconds."
    return None


def reason_to_open(config: BreakerConfig, window: Window) -> str | None:
    """Return why a closed circuit breaker with this window must open, or None if it may stay closed."""
    if not config.enabled or window.calls < config.minimum_calls:
        return None
    return exceeded_rate(config, window.calls, window.failures, window.slow)
