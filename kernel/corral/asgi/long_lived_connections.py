"""Open WebSockets and streams. Gates check them repeatedly, because a client may be blocked while it is connected."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from corral.errors import Problem
from corral.plugin import Gate

log = logging.getLogger("corral.http")

CHECK_SECONDS = 1.0


class LongLivedConnections:
    """Registers the open WebSockets and streams of this process.

    One task checks all of them; it runs only while there are open connections.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates
        self._open: dict[object, tuple[str, str, Callable[[Problem], object]]] = {}
        self._checking: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def hold(self, client_ip: str, path: str, end: Callable[[Problem], object]) -> Iterator[None]:
        """Register a connection while the context is active. Call `end(problem)` when a gate refuses the client."""
        if not self._gates:
            yield
            return
        key = object()
        self._open[key] = client_ip, path, end
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check_all())
        try:
            yield
        finally:
            self._open.pop(key, None)

    async def _check_all(self) -> None:
        while self._open:
            await asyncio.sleep(CHECK_SECONDS)
            for key, (client_ip, path, end) in list(self._open.items()):
                try:
                    for gate in self._gates:
                        gate.check(client_ip, "GET", path)
                except Problem as problem:
                    if self._open.pop(key, None) is not None:
                        end(problem)
                except Exception:
                    log.exception("gate failed to check an open connection")
