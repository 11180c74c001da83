"""The public interface of circuit breakers: the `Breakers` service, the `CircuitOpen` error, and the events."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from corral import clock
from corral.database.model import ADMIN
from corral.errors import Problem, Unavailable, declare_codes
from corral.events.event import Event

declare_codes(
    {
        "circuit_open": (
            503,
            "The circuit breaker is open",
            "The remote system failed repeatedly. Wait as long as Retry-After says. An admin can see the reason with "
            "`corral circuit-breakers show NAME`.",
        )
    }
)

T = TypeVar("T")
State = Literal["closed", "open", "half_open"]
Verdict = Literal["success", "failure", "neutral"]
Judge = Callable[[Any], Verdict]
"""A function that classifies a call by its result or by the exception that it raised."""

FAILURE_STATUSES = frozenset({408, 425, 429})


class CircuitOpen(Unavailable):
    """Raised instead of making a call while the circuit breaker rejects calls. The HTTP response is 503 `circuit_open`.

    `retry_at` is the earliest time at which the breaker may admit a call again.
    """

    default = "circuit_open"

    def __init__(self, name: str, *, retry_at: str) -> None:
        detail = f"The circuit breaker {name} is open, because calls failed repeatedly or an admin opened it."
        seconds = max(1, math.ceil(clock.parse_instant(retry_at) - clock.time_s()))
        super().__init__(detail, retry_after=seconds, breaker=name, retry_at=retry_at)
        self.retry_at, self.retry_after = retry_at, seconds


class ForcedOpen(msgspec.Struct, frozen=True, kw_only=True):
    """An admin's decision to make a circuit breaker reject every call.

    `by` is the id of the user or API key that made the decision, or None if it is unknown.
    """

    by: str | None
    reason: str
    at: str | None


class Breakers(Protocol):
    """Guards calls to other systems. All processes share the state of a circuit breaker.

    A circuit breaker, such as `llm:openai`, is created when a plugin first uses its name. `state`, `blocked_until` and
    `is_forced` only read memory, so they may be called anywhere.
    """

    def declare(
        self, prefix: str, names: Callable[[], Iterable[str]] | None = None, *, slow_call_seconds: int | None = None
    ) -> None:
        """Declare that the calling plugin guards calls under names that begin with `<prefix>:`.

        Call this method when the plugin starts. `names()` returns the guarded names; it is called in a unit of work.
        Without `names`, every name with the prefix is guarded. `slow_call_seconds` replaces the default of
        `slow_call_duration_seconds` for circuit breakers with this prefix.
        """
        ...

    async def guard(self, name: str, call: Callable[[], Awaitable[T]], *, judge: Judge = ...) -> T:
        """Run `call` and return its result, or raise its exception.

        While calls are rejected, raise `CircuitOpen` instead. `judge` decides whether a result or an exception counts
        as a success, as a failure or not at all; the default is `judge_outcome`. A cancelled call is not counted unless
        it was already slow. Call this method outside units of work.
        """
        ...

    def state(self, name: str) -> State:
        """Return the state that this process last read for a circuit breaker."""
        ...

    def blocked_until(self, name: str) -> str | None:
        """Return the time until which the circuit breaker rejects calls, or None if it may admit a call now.

        A circuit breaker that an admin forced open rejects calls until an admin closes it. For such a breaker, this
        method returns a time 60 seconds from now.
        """
        ...

    def is_forced(self, name: str) -> bool:
        """Return whether an admin forced the circuit breaker open, according to the state last read by this process."""
        ...

    def find_forced(self, name: str) -> ForcedOpen | None:
        """Return the decision that forced the circuit breaker open, or None if it is not forced open.

        Runs in a unit of work.
        """
        ...


def judge_status(status: int) -> Verdict:
    """Classify a call by its HTTP status.

    The statuses 5xx, 408, 425 and 429 are failures. Other error statuses are neutral, because the caller caused them.
    """
    if status >= 500 or status in FAILURE_STATUSES:
        return "failure"
    return "neutral" if status >= 400 else "success"


def judge_outcome(outcome: Any) -> Verdict:
    """Classify a call by its outcome.

    A `Problem` is classified by its status. Other exceptions are failures, and results are successes.
    """
    if isinstance(outcome, Problem):
        return judge_status(outcome.status)
    return "failure" if isinstance(outcome, Exception) else "success"


class BreakerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of a circuit breaker's recent calls or, while it is half open, of its probes.

    The rates are percentages. `rejected` and `neutral` count calls since the circuit breaker last closed. `permits_out`
    is the number of probes in flight.
    """

    calls: int = 0
    failures: int = 0
    slow: int = 0
    rejected: int = 0
    failure_rate: float = 0.0
    slow_rate: float = 0.0
    neutral: int = 0
    permits_out: int = 0


class _CircuitEvent(Event, kw_only=True, rename={"from_": "from"}):
    """The fields that all events about circuit breakers have in common."""

    name: str
    from_: str
    to: str
    reason: str
    counts: BreakerCounts


class CircuitOpened(_CircuitEvent):
    """A circuit breaker opened. Calls are rejected until it becomes half open or an admin closes it."""

    event = "circuit.opened"
    visibility = ADMIN


class CircuitHalfOpened(_CircuitEvent):
    """A circuit breaker became half open. A few calls are admitted as probes."""

    event = "circuit.half_opened"
    visibility = ADMIN


class CircuitClosed(_CircuitEvent):
    """A circuit breaker closed. Calls are admitted again."""

    event = "circuit.closed"
    visibility = ADMIN


EVENTS = (CircuitOpened, CircuitHalfOpened, CircuitClosed)
