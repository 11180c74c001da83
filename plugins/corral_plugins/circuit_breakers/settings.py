"""Settings for circuit breakers: the default configuration, and the retention period for transitions."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting, Settings

MAX_COUNT_WINDOW = 1000


def _fits_count_window(value: Any, settings: Settings) -> str | None:
    if settings.get(WINDOW_TYPE) == "count" and value > settings.get(WINDOW_SIZE):
        return "must not exceed circuit_breakers.window_size, because the window counts calls"
    return None


def _holds_minimum_calls(value: Any, settings: Settings) -> str | None:
    if settings.get(WINDOW_TYPE) != "count":
        return None
    if value > MAX_COUNT_WINDOW:
        return f"must not exceed {MAX_COUNT_WINDOW}, because the window counts calls"
    if value < settings.get(MINIMUM_CALLS):
        return "must not be less than circuit_breakers.minimum_calls, because the window counts calls"
    return None


def _is_consistent_type(value: Any, settings: Settings) -> str | None:
    size = settings.get(WINDOW_SIZE)
    if value == "count" and not settings.get(MINIMUM_CALLS) <= size <= MAX_COUNT_WINDOW:
        return (
            f"requires a circuit_breakers.window_size from circuit_breakers.minimum_calls to {MAX_COUNT_WINDOW} "
            "if it is count"
        )
    return None


def _number_setting(key: str, default: int, maximum: int, title: str, **more: Any) -> Setting[int]:
    return Setting(
        name=f"circuit_breakers.{key}", kind=int, default=default, minimum=1, maximum=maximum, title=title, **more
    )


WINDOW_TYPE = Setting(
    name="circuit_breakers.window_type",
    kind=str,
    default="count",
    choices=("count", "time"),
    check=_is_consistent_type,
    title="Default window of circuit breakers: the last calls, or the calls of the last seconds",
)
WINDOW_SIZE = _number_setting(
    "window_size",
    20,
    3600,
    "Default size of a circuit breaker's window, in calls or seconds",
    check=_holds_minimum_calls,
)
MINIMUM_CALLS = _number_setting(
    "minimum_calls",
    10,
    1000,
    "Default minimum number of calls before a rate can open a breaker",
    check=_fits_count_window,
)
FAILURE_RATE_THRESHOLD = _number_setting(
    "failure_rate_threshold", 50, 100, "Default percentage of failures at which a breaker opens"
)
SLOW_CALL_RATE_THRESHOLD = _number_setting(
    "slow_call_rate_threshold", 100, 100, "Default percentage of slow calls at which a breaker opens"
)
SLOW_CALL_DURATION_SECONDS = _number_setting(
    "slow_call_duration_seconds", 30, 3600, "Default number of seconds above which a call counts as slow"
)
WAIT_OPEN_SECONDS = _number_setting(
    "wait_open_seconds", 30, 3600, "Default number of seconds for which a breaker stays open"
)
HALF_OPEN_PERMITS = _number_setting(
    "half_open_permits", 3, 100, "Default maximum number of concurrent probes while a breaker is half open"
)
HALF_OPEN_MAX_SECONDS = _number_setting(
    "half_open_max_seconds", 60, 3600, "Default number of seconds after which a half-open breaker opens again"
)
ENABLED = Setting(
    name="circuit_breakers.enabled",
    kind=bool,
    default=True,
    own_session=True,
    title="Whether circuit breakers that no admin has configured can open; their calls are counted in any case",
)
DEFAULTS: dict[str, Setting[Any]] = {
    "failure_rate_threshold": FAILURE_RATE_THRESHOLD,
    "slow_call_rate_threshold": SLOW_CALL_RATE_THRESHOLD,
    "slow_call_duration_seconds": SLOW_CALL_DURATION_SECONDS,
    "window_type": WINDOW_TYPE,
    "window_size": WINDOW_SIZE,
    "minimum_calls": MINIMUM_CALLS,
    "wait_open_seconds": WAIT_OPEN_SECONDS,
    "half_open_permits": HALF_OPEN_PERMITS,
    "half_open_max_seconds": HALF_OPEN_MAX_SECONDS,
    "enabled": ENABLED,
}
TRANSITION_DAYS = _number_setting("transition_days", 30, 365, "Days during which transitions of breakers are kept")
ALL = (*DEFAULTS.values(), TRANSITION_DAYS)
