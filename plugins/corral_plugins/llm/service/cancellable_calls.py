"""Runs model calls in asyncio tasks that can be cancelled, but never where the outcome of a call could be lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class CallTask(Generic[T]):
    """An asyncio task that cannot be cancelled while it is `protected`.

    If it is cancelled while it is protected, the cancellation takes effect at the end of the protected block.
    """

    def __init__(self, run: Callable[[CallTask[T]], Coroutine[Any, Any, T]]) -> None:
        self._is_protected = self._is_cancelled = False
        self.task = asyncio.get_running_loop().create_task(run(self))

    def cancel(self) -> None:
        """Cancel the task now, or when its protection ends."""
        if self._is_protected:
            self._is_cancelled = True
        else:
            self.task.cancel()

    @contextlib.contextmanager
    def protected(self) -> Iterator[None]:
        """Protect the `with` block from cancellation.

        If the task is cancelled in the meantime, raise `CancelledError` after the block.
        """
        self._is_protected = True
        try:
            yield
        finally:
            self._is_protected = False
            if self._is_cancelled:
                raise asyncio.CancelledError


class CallTasks:
    """The asyncio tasks of this process that make model calls."""

    def __init__(self) -> None:
        self._tasks: set[CallTask[Any]] = set()

    def start(self, run: Callable[[CallTask[T]], Coroutine[Any, Any, T]]) -> CallTask[T]:
        """Start an asyncio task that runs a function. The function receives the task as its argument."""
        started = CallTask(run)
        self._tasks.add(started)
        started.task.add_done_callback(lambda _: self._remove_ended(started))
        return started

    def _remove_ended(self, ended: CallTask[Any]) -> None:
        self._tasks.discard(ended)
        if not ended.task.cancelled():
            ended.task.exception()  # marks the exception as retrieved, because the caller may have disconnected

    async def stop(self) -> None:
        """Cancel the tasks, and return when all of them have ended."""
        for each in tuple(self._tasks):
            each.cancel()
        while self._tasks:
            await asyncio.gather(*(each.task for each in self._tasks), return_exceptions=True)
