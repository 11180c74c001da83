"""Handles failed attempts of steps: starts another attempt, or does what `on_error` specifies."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from corral import clock
from corral_plugins.tasks.api import RetryPolicy
from corral_plugins.workflows.service.graph import GOTO, Step
from corral_plugins.workflows.service.run_state import StepRow

Json = dict[str, Any]


def error_of(step: str, kind: str, type: str, message: str) -> Json:
    """Return the error of a step in the form that clients receive."""
    return {"step": step, "kind": kind, "type": type, "message": message[:4000]}


def end_attempt(step: Step, row: StepRow, error: Json, *, retryable: bool) -> None:
    """End a failed attempt of a step.

    If the retry policy allows another attempt, the step is retried. Otherwise, `on_error` decides whether the step
    fails, jumps to another step or waits for a person.
    """
    error = {"step": step.name, "kind": "error", "type": "error", "message": "", **error}
    attempts = [*row.attempts, {"attempt": row.attempt, "started_at": row.started_at, "ended_at": clock.now()}]
    attempts[-1]["error"] = error
    ended: Json = {"attempts": attempts[-20:], "error": error, "report": None, "lease": None, "lease_until": None}
    ended |= {"reason": None, "event": None, "wake_at": None}
    delay = _retry_delay(step, row.attempt, error) if retryable else None
    if delay is not None:
        row.set(
            **ended | {"status": "ready", "attempt": row.attempt + 1, "wake_at": clock.now(delay), "waits_for": None}
        )
    elif step.on_error == "pause":
        row.set(**ended | {"status": "waiting", "reason": "error", "person": True})
    else:
        goto = step.on_error.removeprefix(GOTO) if step.on_error.startswith(GOTO) else None
        row.set(**ended | {"status": "failed", "goto": goto, "finished_at": clock.now()})


def is_handled(step: Step, row: StepRow) -> bool:
    """Return whether a run can continue although this step has failed."""
    return row.goto is not None or step.on_error == "continue"


def _retry_delay(step: Step, attempt: int, error: Json) -> float | None:
    """Return the delay in seconds before the next attempt, or None if there is no further attempt."""
    policy = msgspec.convert(step.retry_policy or {}, RetryPolicy)
    if attempt >= (policy.max_attempts or 1):
        return None
    if policy.retry_on and error["kind"] not in policy.retry_on:
        return None
    if policy.non_retryable_types and error["type"] in policy.non_retryable_types:
        return None
    initial = 10.0 if policy.initial_seconds is msgspec.UNSET else policy.initial_seconds
    factor = 2.0 if policy.factor is msgspec.UNSET else policy.factor
    most = 600.0 if policy.max_seconds is msgspec.UNSET else policy.max_seconds
    jitter = 0.1 if policy.jitter is msgspec.UNSET else policy.jitter
    match policy.backoff:
        case "fixed":
            delay = initial
        case "linear":
            delay = initial * attempt
        case _:
            delay = initial * factor ** min(attempt - 1, 64)
    return min(most, delay) * (1 + random.uniform(-jitter, jitter))  # noqa: S311  (no secret)
