"""The request and response bodies of the circuit breaker routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.http.page import PageQuery
from corral.schema.fields import Instant, text_format
from corral_plugins.circuit_breakers.api import BreakerCounts, State

NAME = r"^[a-z0-9:._-]{1,100}(?![\s\S])"

Percent = Annotated[int, Meta(ge=1, le=100)]
Seconds = Annotated[int, Meta(ge=1, le=3600)]
UpTo1000 = Annotated[int, Meta(ge=1, le=1000)]


class BreakerConfiguration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The configuration of a circuit breaker. An existing circuit breaker keeps its values for absent fields."""

    name: Annotated[
        str,
        text_format(
            NAME, "1 to 100 characters of a-z, 0-9, :, ., _ and -, such as llm:openai", examples=["llm:openai"]
        ),
    ]
    description: Annotated[str, Meta(max_length=500)] | UnsetType = UNSET
    failure_rate_threshold: Percent | UnsetType = UNSET
    slow_call_rate_threshold: Percent | UnsetType = UNSET
    slow_call_duration_seconds: Seconds | UnsetType = UNSET
    window_type: Literal["count", "time"] | UnsetType = UNSET
    window_size: Annotated[int, Meta(ge=1, le=3600)] | UnsetType = UNSET  # at most 1,000 calls if it counts calls
    minimum_calls: UpTo1000 | UnsetType = UNSET
    wait_open_seconds: Seconds | UnsetType = UNSET
    half_open_permits: Percent | UnsetType = UNSET
    half_open_max_seconds: Seconds | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class ReasonBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The reason for forcing a circuit breaker open or closed, which is shown with the breaker and its transitions."""

    reason: Annotated[str, Meta(max_length=500)] = ""


class BreakerQuery(PageQuery, kw_only=True, forbid_unknown_fields=True):
    """Filters for listing circuit breakers.

    If `guarded` is true, only breakers with which a plugin guards calls match; if it is false, only the others match.
    """

    state: list[State] = msgspec.field(default_factory=list)
    prefix: Annotated[str, Meta(min_length=1, max_length=100)] | UnsetType = UNSET
    guarded: bool | UnsetType = UNSET


class LastError(msgspec.Struct, kw_only=True):
    """The last failure of a guarded call. `type` is the name of the exception's class."""

    type: str
    message: str
    at: Instant


class BreakerView(msgspec.Struct, kw_only=True):
    """A circuit breaker. `source` is `configured` if an admin has configured it.

    `opened_at` is the time at which the breaker last left the closed state. The first call after `retry_at` makes it
    half open; null means that an admin forced it open, so it stays open until an admin closes it.
    """

    name: str
    description: str
    failure_rate_threshold: int
    slow_call_rate_threshold: int
    slow_call_duration_seconds: int
    window_type: Literal["count", "time"]
    window_size: int
    minimum_calls: int
    wait_open_seconds: int
    half_open_permits: int
    half_open_max_seconds: int
    enabled: bool
    state: State
    forced: bool
    opened_at: Instant | None
    retry_at: Instant | None
    reason: str
    generation: int
    guarded: bool
    source: Literal["default", "configured"]
    counts: BreakerCounts
    last_error: LastError | None
    version: int


class TransitionView(msgspec.Struct, kw_only=True, rename={"from_": "from"}):
    """A transition of a circuit breaker. `by` is the id of the user or API key that caused it; null means Corral."""

    from_: State
    to: State
    reason: str
    by: str | None
    counts: dict[str, Any]
    at: Instant


class BreakerDetail(BreakerView, kw_only=True):
    """A circuit breaker with its last 50 transitions, newest first."""

    transitions: list[TransitionView]
