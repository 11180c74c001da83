"""A PostgreSQL server that stands still: it is there, and answers nobody."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import psutil

from corral.testing.database_servers import PostgresServer


@contextlib.contextmanager
def standing_still(server: PostgresServer) -> Iterator[None]:
    """All of its processes, until the end of the block."""
    parent = psutil.Process(server.pid)
    pids = [parent.pid, *(child.pid for child in parent.children(recursive=True))]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
