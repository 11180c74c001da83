"""Limits how many threads of a thread pool one plugin can occupy at the same time."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ThreadShares(Generic[T]):
    """Lets each plugin occupy at most half of the threads in a pool. Further calls wait until earlier calls end."""

    def __init__(self, pool_size: int) -> None:
        self.limit = max(1, pool_size // 2)
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[T]] = defaultdict(deque)

    def waiting(self, plugin: str) -> int:
        """Return the number of waiting calls of a plugin."""
        return len(self._waiting[plugin])

    def acquire(self, plugin: str, call: T) -> bool:
        """Reserve a thread from the plugin's share for a call.

        If no thread in the share is free, queue the call and return False.
        """
        with self._lock:
            if self._running[plugin] >= self.limit:
                self._waiting[plugin].append(call)
                return False
            self._running[plugin] += 1
            return True

    def release(self, plugin: str) -> T | None:
        """Record that a call of the plugin has ended. Return its next waiting call, which must run now, or None."""
        with self._lock:
            if self._waiting[plugin]:
                return self._waiting[plugin].popleft()
            self._running[plugin] -= 1
            return None
