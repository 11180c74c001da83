"""R3: a receiver of webhooks is down, and the server is killed meanwhile: every event arrives after its return.

Short form: 60 events, 10 seconds and two kills, with probes and breakers that look more often. Long form (`--long`):
1,000 events, 10 minutes and five kills, with the settings of a new installation.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
from tests.limits import Stopwatch
from tests.plugins.webhooks.receivers import Receiver

from corral.testing.server import ServerProcess, free_port

RETURN_SECONDS = 120.0
FASTER = {"webhooks/probe_seconds": 10, "circuit_breakers/wait_open_seconds": 3}


def prepare(admin: httpx2.Client, url: str, long_form: bool) -> Any:
    for path, value in () if long_form else FASTER.items():
        assert admin.put(f"/settings/{path}", json={"value": value}).status_code == 200
    made = admin.post("/webhooks", json={"url": url, "events": ["task.created"]})
    assert made.status_code == 201, made.text
    return made.json()


def create_tasks(server: ServerProcess, count: int, seconds: float) -> list[str]:
    """Create tasks spread over some seconds; their ids."""
    admin, ids = server.sign_in(), []
    for _ in range(count):
        while (answer := admin.post("/tasks", json={"title": "told"})).status_code == 503:  # the machine is busy
            time.sleep(0.5)
        assert answer.status_code == 201, answer.text
        ids.append(answer.json()["id"])
        time.sleep(seconds / count)
    admin.close()
    return ids


async def test_r03_a_receiver_that_was_down_gets_every_event(
    database_url: str, tmp_path: Path, long_form: bool, figure: Any
) -> None:
    events, down, kills = (1000, 600.0, 5) if long_form else (60, 10.0, 2)
    environ = {"CORRAL_EGRESS_ALLOW": "127.0.0.0/8", "CORRAL_ACCESS_TTL": "3600"}
    server = ServerProcess(tmp_path, database_url=database_url, environ=environ)
    receiver, tasks = Receiver(), list[str]()
    receiver.port = free_port()  # nobody listens there yet: it refuses connections
    try:
        await asyncio.to_thread(server.start)
        made = await asyncio.to_thread(lambda: prepare(server.sign_in(), receiver.url, long_form))
        for _ in range(kills):
            tasks += await asyncio.to_thread(create_tasks, server, events // kills, down / kills)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        assert receiver.messages == []
        await receiver.start()
        with Stopwatch() as watch:
            while len(receiver.ids) < events and watch.seconds < RETURN_SECONDS:  # noqa: ASYNC110  (distinct ids)
                await asyncio.sleep(0.1)
        took = watch.seconds
        await asyncio.sleep(1.0)
    finally:
        await asyncio.to_thread(server.kill)
        await receiver.stop()
    told = Counter(message.content["data"]["task_id"] for message in receiver.messages)
    lost = set(tasks) - told.keys()
    assert not lost, f"{len(lost)} of {events} events were not delivered"
    assert len(receiver.ids) == len(tasks) == events
    doubled = len(receiver.messages) - events
    assert doubled <= events / 100, f"{doubled} messages came twice"
    assert all(message.verify_signature(made["secret"]) for message in receiver.messages)
    assert receiver.doubled == 0
    shown = {"events": events, "kills": kills, "down_s": down, "delivered_s": round(took, 1), "doubled": doubled}
    figure("R3", shown)
