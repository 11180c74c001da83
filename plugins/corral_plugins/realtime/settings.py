"""The run-time settings of the `realtime` plugin, and the kernel setting that the plugin reads."""

from __future__ import annotations

from corral.plugin import Setting

MAX_SOCKETS = Setting(
    name="realtime.max_sockets_per_user",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Maximum number of open WebSockets and event streams per user",
)
QUEUE_SIZE = Setting(
    name="realtime.queue_size",
    kind=int,
    default=1000,
    minimum=100,
    maximum=10_000,
    title="Number of queued frames after which a slow reader is disconnected",
)
REPLAY_LIMIT = Setting(
    name="realtime.replay_limit",
    kind=int,
    default=10_000,
    minimum=100,
    maximum=100_000,
    title="Maximum number of events in one replay",
)
SETTINGS = (MAX_SOCKETS, QUEUE_SIZE, REPLAY_LIMIT)

CORS_ORIGINS: Setting[list[str]] = Setting(
    name="http.cors_origins",
    kind=list[str],
    default=[],
    title="Origins of other web applications that may call the API",
)
"""The allowed CORS origins. The kernel declares this setting, and this plugin reads it by name."""
