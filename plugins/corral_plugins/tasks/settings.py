"""Run-time settings of the `tasks` plugin, and the retry and stall policies that result from them.

For each field of a policy, the task's value takes precedence over the agent's value, and both take precedence over the
settings.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from corral.plugin import Setting, Settings
from corral_plugins.agents.api import AgentFacts

MAX_ATTEMPTS = Setting(
    name="tasks.max_attempts",
    env="CORRAL_TASK_MAX_ATTEMPTS",
    kind=int,
    default=3,
    title="Maximum number of attempts of a task",
    minimum=1,
    maximum=100,
)
BACKOFF_INITIAL = Setting(
    name="tasks.backoff_initial_seconds",
    kind=float,
    default=10.0,
    title="Delay before the second attempt of a task, in seconds",
    minimum=0,
    maximum=3600,
)
BACKOFF_FACTOR = Setting(
    name="tasks.backoff_factor",
    kind=float,
    default=2.0,
    title="Factor by which the delay grows after each attempt of a task",
    minimum=1,
    maximum=10,
)
BACKOFF_MAX = Setting(
    name="tasks.backoff_max_seconds",
    kind=float,
    default=600.0,
    title="Maximum delay between attempts of a task, in seconds",
    minimum=1,
    maximum=86_400,
)
BACKOFF_JITTER = Setting(
    name="tasks.backoff_jitter",
    kind=float,
    default=0.1,
    title="Random fraction of the delay between attempts of a task",
    minimum=0,
    maximum=1,
)
LEASE_SECONDS = Setting(
    name="tasks.lease_seconds",
    env="CORRAL_TASK_LEASE_SECONDS",
    kind=int,
    default=60,
    title="Lifetime of a lease that is not renewed, in seconds",
    minimum=10,
    maximum=3600,
)
ACK_SECONDS = Setting(
    name="tasks.ack_seconds",
    kind=int,
    default=30,
    title="Seconds within which a worker must start a claimed task",
    minimum=5,
    maximum=600,
)
CANCEL_GRACE = Setting(
    name="tasks.cancel_grace_seconds",
    kind=int,
    default=60,
    title="Seconds within which a worker must end a cancelled run",
    minimum=1,
    maximum=3600,
)
TIMEOUT_SECONDS = Setting(
    name="tasks.timeout_seconds",
    kind=int,
    default=3600,
    title="Time limit of an attempt, in seconds",
    minimum=10,
    maximum=604_800,
)
STALL_SECONDS = Setting(
    name="tasks.stall_seconds",
    kind=int,
    default=900,
    title="Seconds without activity after which a run counts as stalled (0: never)",
    minimum=0,
    maximum=86_400,
)
LOOP_REPEATS = Setting(
    name="tasks.loop_repeats",
    kind=int,
    default=6,
    title="Number of identical consecutive steps that count as a loop",
    minimum=2,
    maximum=50,
)
CRASH_LIMIT = Setting(
    name="tasks.crash_limit",
    kind=int,
    default=3,
    title="Number of consecutive lost leases after which a task fails",
    minimum=1,
    maximum=10,
)
AGING_SECONDS = Setting(
    name="tasks.aging_seconds",
    kind=int,
    default=600,
    title="Waiting time in seconds after which the priority of a pending task rises by one (0: never)",
    minimum=0,
    maximum=86_400,
)
FAIR_SHARE = Setting(
    name="tasks.fair_share",
    kind=float,
    default=1.0,
    title="Share of all running tasks above which further tasks of the same person wait",
    minimum=0.1,
    maximum=1,
)
MAX_OPEN = Setting(
    name="tasks.max_open_per_user",
    kind=int,
    default=100_000,
    title="Maximum number of unfinished tasks per person",
    minimum=1,
    maximum=1_000_000,
)
RETENTION_DAYS: Setting[int | None] = Setting(
    name="tasks.retention_days",
    kind=int,
    default=None,
    title="Days for which ended tasks are kept (null: forever)",
    minimum=1,
    maximum=3650,
)

ALL: tuple[Setting[Any], ...] = (
    MAX_ATTEMPTS,
    BACKOFF_INITIAL,
    BACKOFF_FACTOR,
    BACKOFF_MAX,
    BACKOFF_JITTER,
    LEASE_SECONDS,
    ACK_SECONDS,
    CANCEL_GRACE,
    TIMEOUT_SECONDS,
    STALL_SECONDS,
    LOOP_REPEATS,
    CRASH_LIMIT,
    AGING_SECONDS,
    FAIR_SHARE,
    MAX_OPEN,
    RETENTION_DAYS,
)

# The `workers` plugin declares this setting; this plugin only reads it, by name.
ACCEPT_LATE_RESULTS = Setting(
    name="workers.accept_late_results",
    kind=bool,
    default=False,
    title="Whether a result that arrives after a person requested the cancellation of a task still completes the task",
)


class AppliedRetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The retry policy of an attempt, with every field set (see `RetryPolicy`)."""

    max_attempts: int
    backoff: str = "exponential"
    initial_seconds: float
    factor: float
    max_seconds: float
    jitter: float
    retry_on: tuple[str, ...] = ("error", "timeout", "lease_lost", "stalled")
    non_retryable_types: tuple[str, ...] = ()


class AppliedStallPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The stall policy of an attempt, with every field set (see `StallPolicy`)."""

    stall_seconds: int
    loop_repeats: int
    action: str = "notify"


def retry_policy(settings: Settings, agent: AgentFacts | None, own: dict[str, Any] | None) -> AppliedRetryPolicy:
    """Merge the retry policies of a task, its agent and the settings. The task takes precedence, then the agent."""
    of_settings = {
        "max_attempts": settings.get(MAX_ATTEMPTS),
        "initial_seconds": settings.get(BACKOFF_INITIAL),
        "factor": settings.get(BACKOFF_FACTOR),
        "max_seconds": settings.get(BACKOFF_MAX),
        "jitter": settings.get(BACKOFF_JITTER),
    }
    of_agent = agent.retry_policy if agent is not None else None
    return msgspec.convert({**of_settings, **(of_agent or {}), **(own or {})}, AppliedRetryPolicy)


def stall_policy(settings: Settings, agent: AgentFacts | None, own: dict[str, Any] | None) -> AppliedStallPolicy:
    """Merge the stall policies of a task, its agent and the settings, with the same precedence as `retry_policy`."""
    of_settings = {"stall_seconds": settings.get(STALL_SECONDS), "loop_repeats": settings.get(LOOP_REPEATS)}
    of_agent = agent.stall_policy if agent is not None else None
    return msgspec.convert({**of_settings, **(of_agent or {}), **(own or {})}, AppliedStallPolicy)


def max_attempts(settings: Settings, agent: AgentFacts | None, own: dict[str, Any] | None) -> int:
    """Return the maximum number of attempts that the merged retry policy allows."""
    of_agent = agent.retry_policy if agent is not None else None
    found: int = {"max_attempts": settings.get(MAX_ATTEMPTS), **(of_agent or {}), **(own or {})}["max_attempts"]
    return found


def delay_seconds(policy: AppliedRetryPolicy, attempt: int) -> float:
    """Return the delay in seconds before the retry that follows attempt number `attempt`."""
    if policy.backoff == "fixed":
        delay = policy.initial_seconds
    elif policy.backoff == "linear":
        delay = policy.initial_seconds * attempt
    else:
        delay = policy.initial_seconds * min(policy.factor ** (attempt - 1), 1e9)
    jitter = 1 + policy.jitter * (2 * random.random() - 1)  # noqa: S311  (the jitter spreads load; it is no secret)
    return float(min(policy.max_seconds, delay) * jitter)
