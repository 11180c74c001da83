"""Run-time settings of the `tools` plugin."""

from __future__ import annotations

from corral.plugin import Setting

MAX_CALLS = Setting(
    name="tools.max_calls",
    kind=int,
    default=200,
    minimum=1,
    maximum=10_000,
    title="Maximum number of tool calls per attempt",
)
TIMEOUT_SECONDS = Setting(
    name="tools.timeout_seconds",
    kind=int,
    default=60,
    minimum=1,
    maximum=600,
    title="Default time limit of a tool in seconds",
)
TAINT_ENABLED = Setting(
    name="tools.taint_enabled",
    own_session=True,
    kind=bool,
    default=True,
    title="Whether external tools need approval in runs that received untrusted content",
)
CALL_RETENTION_DAYS = Setting(
    name="tools.call_retention_days",
    kind=int,
    default=90,
    minimum=1,
    maximum=3650,
    title="Days for which tool calls are kept",
)
APPROVAL_TTL = Setting(
    name="tools.approval_ttl_seconds",
    kind=int,
    default=86_400,
    minimum=900,
    maximum=86_400,
    title="Seconds for which the approval of a tool call stays open",
)
ALL = (MAX_CALLS, TIMEOUT_SECONDS, TAINT_ENABLED, APPROVAL_TTL, CALL_RETENTION_DAYS)
