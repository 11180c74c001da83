"""Run-time settings of the `workers` plugin, and two settings of the `tasks` plugin that are sent to workers."""

from __future__ import annotations

from typing import Any

from corral.plugin import Setting, Settings

HEARTBEAT_SECONDS = Setting(
    name="workers.heartbeat_seconds",
    kind=int,
    default=15,
    title="Seconds between heartbeats of a worker",
    minimum=1,
    maximum=300,
)


def _at_least_three_heartbeats(value: int, settings: Settings) -> str | None:
    least = 3 * settings.get(HEARTBEAT_SECONDS)
    return None if value >= least else f"must be at least {least}, three times workers.heartbeat_seconds"


OFFLINE_AFTER_SECONDS = Setting(
    name="workers.offline_after_seconds",
    kind=int,
    default=45,
    minimum=3,
    maximum=3600,
    check=_at_least_three_heartbeats,
    title="Seconds without a heartbeat after which a worker is offline (at least three heartbeats)",
)
AUTO_APPROVE = Setting(
    name="workers.auto_approve",
    own_session=True,
    kind=bool,
    default=False,
    title="Whether every worker that registers is approved automatically (unsafe)",
)
MAX_WORKERS = Setting(
    name="workers.max_workers",
    kind=int,
    default=1000,
    title="Maximum number of workers",
    minimum=1,
    maximum=10_000,
)
ACCEPT_LATE_RESULTS = Setting(
    name="workers.accept_late_results",
    kind=bool,
    default=False,
    title="Whether a result that arrives after a person requested the cancellation of a task still completes the task",
)
PRUNE_DAYS: Setting[int | None] = Setting(
    name="workers.prune_days",
    kind=int | None,
    default=30,
    minimum=1,
    maximum=3650,
    title="Days after which an offline worker without leases is deleted (null: never)",
)

ALL: tuple[Setting[Any], ...] = (
    HEARTBEAT_SECONDS,
    OFFLINE_AFTER_SECONDS,
    AUTO_APPROVE,
    MAX_WORKERS,
    ACCEPT_LATE_RESULTS,
    PRUNE_DAYS,
)

# The `tasks` plugin declares these settings; this plugin only reads them, by name.
LEASE_SECONDS = Setting(name="tasks.lease_seconds", kind=int, default=60, title="Seconds until a lease expires")
ACK_SECONDS = Setting(
    name="tasks.ack_seconds", kind=int, default=30, title="Seconds within which a claimed task must be started"
)


def heartbeat_seconds(settings: Settings) -> int:
    """Return the number of seconds between heartbeats.

    The value is at most a third of the lease duration, because heartbeats renew leases.
    """
    return max(1, min(settings.get(HEARTBEAT_SECONDS), settings.get(LEASE_SECONDS) // 3))


def offline_seconds(settings: Settings) -> float:
    """Return the number of seconds without a call after which a worker is considered offline."""
    return max(settings.get(OFFLINE_AFTER_SECONDS), 3 * settings.get(HEARTBEAT_SECONDS))
