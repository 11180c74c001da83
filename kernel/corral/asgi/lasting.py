"""Sockets and streams outlive the moment they were let in, so the gates judge them again while they last."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from corral.errors import Problem
from corral.plugin import Gate

log = logging.getLogger("corral.http")

JUDGE_EVERY = 1.0


class Lasting:
    """The open connections of this process. One task judges them all; without a gate or a connection there is none."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates
        self._open: dict[object, tuple[str, str, Callable[[Problem], object]]] = {}
        self._judging: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def hold(self, client_ip: str, path: str, end: Callable[[Problem], object]) -> Iterator[None]:
        """While this lasts, `end(problem)` is called as soon as a gate refuses the client."""
        if not self._gates:
            yield
            return
        key = object()
        self._open[key] = client_ip, path, end
        if self._judging is None or self._judging.done():
            self._judging = asyncio.get_running_loop().create_task(self._judge_all())
        try:
            yield
        finally:
            self._open.pop(key, None)

    async def _judge_all(self) -> None:
        while self._open:
            await asyncio.sleep(JUDGE_EVERY)
            for key, (client_ip, path, end) in list(self._open.items()):
                problem = self._judge(client_ip, path)
                if problem is not None and self._open.pop(key, None) is not None:
                    end(problem)

    def _judge(self, client_ip: str, path: str) -> Problem | None:
        try:
            for gate in self._gates:
                gate.check(client_ip, "GET", path)
        except Problem as problem:
            return problem
        except Exception:
            log.exception("a gate failed to judge an open connection")
        return None
