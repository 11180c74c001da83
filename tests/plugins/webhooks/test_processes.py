"""Webhooks in real processes, which share the work."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.plugins.webhooks.receivers import Receiver

from corral.testing.server import ServerProcess

SECONDS = 60.0


async def test_webhooks_8_two_processes_never_attempt_a_delivery_at_a_time(
    tmp_path: Path, database_url: str, long_form: bool
) -> None:
    """Short form: 60 events. Long form: 500."""
    events = 500 if long_form else 60
    arguments = ("--no-embedded-worker", "--processes", "2")
    environ = {"CORRAL_EGRESS_ALLOW": "127.0.0.0/8", "CORRAL_WEBHOOK_RETRY_SCHEDULE": "0,1,1,1,1,1"}
    async with Receiver() as receiver:
        receiver.seconds = 0.05
        server = ServerProcess(tmp_path, database_url=database_url, arguments=arguments, environ=environ)
        try:
            await asyncio.to_thread(server.start)
            admin = await asyncio.to_thread(server.sign_in)
            body = {"url": receiver.url, "events": ["task.created"]}
            made = await asyncio.to_thread(lambda: admin.post("/webhooks", json=body).json())
            for number in range(events):
                answer = await asyncio.to_thread(admin.post, "/tasks", json={"title": f"task {number}"})
                assert answer.status_code == 201
            messages = await receiver.wait_for(events, seconds=SECONDS + events / 5)
            await asyncio.sleep(1.0)
            rows = await asyncio.to_thread(lambda: admin.get(f"/webhooks/{made['id']}/deliveries?limit=1").json())
        finally:
            await asyncio.to_thread(server.kill)
    assert len(messages) == len(receiver.ids) == rows["total"] == events
    assert receiver.doubled == 0
    assert receiver.most_running <= 5
    assert all(message.verify_signature(made["secret"]) for message in messages)
