"""Run-time settings of the `workflows` plugin."""

from __future__ import annotations

from corral.plugin import Setting

MAX_PARALLEL: Setting[int] = Setting(
    name="workflows.max_parallel",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Maximum number of concurrent steps of a workflow run",
    description="The limit applies to workflows that set no max_parallel of their own.",
)
MAX_ACTIVE_RUNS: Setting[int] = Setting(
    name="workflows.max_active_runs",
    kind=int,
    default=1000,
    minimum=1,
    maximum=100_000,
    title="Maximum number of concurrently active workflow runs",
    description="Runs above this limit wait in the queue.",
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
    title="Maximum nesting depth of workflows that start other workflows",
)
RUN_TIMEOUT_SECONDS: Setting[int] = Setting(
    name="workflows.run_timeout_seconds",
    kind=int,
    default=86_400,
    minimum=60,
    maximum=2_592_000,
    title="Time limit of a workflow run, in seconds",
    description="The time limit applies to workflows that set no limit of their own. Time that a run spends waiting "
    "for people does not count.",
)
RUN_RETENTION_DAYS: Setting[int | None] = Setting(
    name="workflows.run_retention_days",
    kind=int | None,
    default=180,
    minimum=1,
    maximum=3650,
    title="Days for which ended workflow runs are kept (null: forever)",
)
SETTINGS = (MAX_PARALLEL, MAX_ACTIVE_RUNS, MAX_STEPS, MAX_DEPTH, RUN_TIMEOUT_SECONDS, RUN_RETENTION_DAYS)
