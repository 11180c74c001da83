"""The settings of workflows."""

from __future__ import annotations

from corral.plugin import Setting

MAX_PARALLEL: Setting[int] = Setting(
    name="workflows.max_parallel",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Maximum number of steps of a run that run at the same time",
    description="Applies to workflows that set no number of their own.",
)
MAX_ACTIVE_RUNS: Setting[int] = Setting(
    name="workflows.max_active_runs",
    kind=int,
    default=1000,
    minimum=1,
    maximum=100_000,
    title="Maximum number of runs that are active at the same time",
    description="Further runs wait in the queue.",
)
MAX_STEPS: Setting[int] = Setting(
    name="workflows.max_steps",
    kind=int,
    default=200,
    minimum=1,
    maximum=1000,
    title="Maximum number of steps of a workflow",
)
MAX_DEPTH: Setting[int] = Setting(
    name="workflows.max_depth",
    kind=int,
    default=5,
    minimum=1,
    maximum=10,
    title="Maximum depth of workflows that start other workflows",
)
RUN_TIMEOUT_SECONDS: Setting[int] = Setting(
    name="workflows.run_timeout_seconds",
    kind=int,
    default=86_400,
    minimum=60,
    maximum=2_592_000,
    title="Time limit of a run in seconds",
    description="Applies to workflows that set no limit of their own. The time for which a run waits for people does "
    "not count.",
)
RUN_RETENTION_DAYS: Setting[int | None] = Setting(
    name="workflows.run_retention_days",
    kind=int | None,
    default=180,
    minimum=1,
    maximum=3650,
    title="Days for which runs are kept after they have ended (null: forever)",
)
SETTINGS = (MAX_PARALLEL, MAX_ACTIVE_RUNS, MAX_STEPS, MAX_DEPTH, RUN_TIMEOUT_SECONDS, RUN_RETENTION_DAYS)
