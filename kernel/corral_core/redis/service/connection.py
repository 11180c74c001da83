"""Connections to the Redis server, with short timeouts and without retries by the client library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corral.errors import StartupError

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

ANSWER_SECONDS = 2.0
HEALTH_SECONDS = 15
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 3.0


def connect_sync(url: str, *, seconds: float = ANSWER_SECONDS) -> Redis:
    """Return a synchronous client, which connects on the first command. `seconds` is the timeout for each command."""
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    options: dict[str, Any] = _connection_options(seconds)
    return Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)


def connect_async(url: str) -> AsyncRedis:
    """Return an asynchronous client. Raise `StartupError` for an invalid URL."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    options: dict[str, Any] = _connection_options(ANSWER_SECONDS)
    try:
        client: AsyncRedis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), **options)
    except ValueError as error:
        raise StartupError(f"redis.url: {error}") from None
    return client


def _connection_options(seconds: float) -> dict[str, Any]:
    return {
        "socket_timeout": seconds,
        "socket_connect_timeout": ANSWER_SECONDS,
        "health_check_interval": HEALTH_SECONDS,
    }


class ReconnectBackoff:
    """Exponential backoff between connection attempts. Call `reset()` after a success."""

    def __init__(self) -> None:
        self._next = FIRST_PAUSE

    def reset(self) -> None:
        """Start again with the shortest pause, `FIRST_PAUSE`."""
        self._next = FIRST_PAUSE

    def next_pause(self) -> float:
        """Return the next pause in seconds. Each pause is twice as long as the previous one, up to `LONGEST_PAUSE`."""
        pause, self._next = self._next, min(LONGEST_PAUSE, self._next * 2)
        return pause
