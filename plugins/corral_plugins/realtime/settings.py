"""Run-time settings."""

from __future__ import annotations

from corral.plugin import Setting

MAX_SOCKETS = Setting(
    name="realtime.max_sockets_per_user",
    kind=int,
    default=10,
    minimum=1,
    maximum=100,
    title="Sockets and streams a user",
)
QUEUE_SIZE = Setting(
    name="realtime.queue_size",
    kind=int,
    default=1000,
    minimum=100,
    maximum=10_000,
    title="Events that may wait for a reader",
)
REPLAY_LIMIT = Setting(
    name="realtime.replay_limit",
    kind=int,
    default=10_000,
    minimum=100,
    maximum=100_000,
    title="Events replayed at once",
)
SETTINGS = (MAX_SOCKETS, QUEUE_SIZE, REPLAY_LIMIT)
CORS_ORIGINS: Setting[list[str]] = Setting(
    name="http.cors_origins", kind=list[str], default=[], title="Declared by core"
)
