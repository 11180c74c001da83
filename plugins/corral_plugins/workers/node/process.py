"""The body of a task's process: its own group, one agent loop, and an end as soon as the worker is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from corral_plugins.workers.node.client import Client
from corral_plugins.workers.node.loop import AgentLoop
from corral_plugins.workers.node.state import Wishes


def main(url: str, claim: Mapping[str, Any], inbox: Any) -> None:
    """Work on the claim. `inbox` brings the worker's wishes, and its end."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wishes = Wishes()
    threading.Thread(target=_listen, args=(inbox, wishes), daemon=True).start()
    sys.exit(asyncio.run(_run(url, claim, wishes)))


def _listen(inbox: Any, wishes: Wishes) -> None:
    """Hear the worker's wishes; when it is dead, so is everything of this task."""
    while True:
        try:
            wishes.add(inbox.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)


async def _run(url: str, claim: Mapping[str, Any], wishes: Wishes) -> int:
    client = Client(url, claim["agent_token"])
    try:
        return await AgentLoop(client, claim, wishes).run()
    finally:
        await client.close()
