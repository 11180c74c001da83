"""The body of a task's process: its own group, one agent loop, and an end as soon as the worker is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from corral_plugins.workers.node.client import Client
from corral_plugins.workers.node.state import Wishes


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Where tasks run: the server's address, the tools that agents may use here, and the folder of workspaces."""

    url: str
    allowed: tuple[str, ...]
    workspaces: str


def main(site: Site, claim: Mapping[str, Any], inbox: Any) -> None:
    """Work on the claim. `inbox` brings the worker's wishes, and its end."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wishes = Wishes()
    threading.Thread(target=_listen, args=(inbox, wishes), daemon=True).start()
    try:
        status = asyncio.run(_run(site, claim, wishes))
    except asyncio.CancelledError:  # what it had started has ended: now as if it had not been caught
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    sys.exit(status)


def loaded() -> None:
    """The body of a process that does nothing: once it has ended, the fork server has loaded what tasks need."""


def _listen(inbox: Any, wishes: Wishes) -> None:
    """Hear the worker's wishes; when it is dead, so is everything of this task."""
    while True:
        try:
            wishes.add(inbox.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


async def _run(site: Site, claim: Mapping[str, Any], wishes: Wishes) -> int:
    from corral_plugins.workers.node.loop import AgentLoop
    from corral_plugins.workers.node.tools.workspace import Workspaces

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    workspaces = Workspaces(Path(site.workspaces)) if site.allowed else None
    client = Client(site.url, claim["agent_token"])
    try:
        return await AgentLoop(client, claim, wishes, allowed=site.allowed, workspaces=workspaces).run()
    finally:
        await client.close()
