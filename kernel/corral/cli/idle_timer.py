"""How long Hypercorn keeps a connection on which nothing happens: a deadline that each request moves.

Stock Hypercorn ends a task and makes another for every request, which costs a sixth of the time of a short one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("corral.http")


class IdleTimer:
    """In place of `hypercorn.asyncio.worker_context.AsyncioSingleTask`, for the connections of `TCPServer`."""

    def __init__(self) -> None:
        self._deadline: float | None = None  # None: a request is being answered
        self._watching: asyncio.Task[None] | None = None
        self._server: Any = None

    async def restart(self, task_group: Any, action: Callable[[], Any]) -> None:
        """Nothing happens from now on. `action` is a method of the connection."""
        if self._watching is None or self._watching.done():
            self._server = action.__self__  # type: ignore[attr-defined]  # a bound method
            self._watching = task_group._task_group.create_task(self._watch())
        server = self._server
        self._deadline = server.loop.time() + server.config.keep_alive_timeout

    async def stop(self) -> None:
        """A request has come, or the connection is closed."""
        self._deadline = None
        watching = self._watching
        if watching is not None and self._server.writer.is_closing():
            self._watching = None
            watching.cancel()
            await asyncio.wait({watching})

    async def _watch(self) -> None:
        server = self._server
        terminated, patience = server.context.terminated, server.config.keep_alive_timeout
        while not server.reader.at_eof():
            due = self._deadline
            wait = patience if due is None else due - server.loop.time()
            if wait <= 0:
                break
            try:
                async with asyncio.timeout(wait):
                    await terminated.wait()
            except TimeoutError:
                continue
            if self._deadline is None:  # the connection is closed when its request is answered
                return
            break
        if self._deadline is not None:
            await asyncio.shield(server._initiate_server_close())


def install() -> None:
    """Have the connections of this process use it, where Hypercorn is as it was when this was written."""
    from hypercorn.asyncio import tcp_server

    if hasattr(tcp_server, "AsyncioSingleTask"):
        tcp_server.AsyncioSingleTask = IdleTimer
    else:
        log.info("this Hypercorn has another idle timer; it is left as it is")
