"""Notifications in real processes, which share the work and are killed."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from tests.kernel.mail.conftest import MailServer
from tests.plugins.webhooks.receivers import Receiver

from corral.testing.server import ServerProcess

SECONDS = 240.0
ARGUMENTS = ("--no-embedded-worker", "--processes", "2")
ENVIRON = {"CORRAL_EGRESS_ALLOW": "127.0.0.0/8", "CORRAL_ACCESS_TTL": "3600"}
NO_TIME_LEFT = "UPDATE notifications_deliveries SET lease_until = '2000-01-01T00:00:00.000Z' WHERE lease IS NOT NULL"
IS_DUE = "UPDATE notifications_deliveries SET due_at = '2000-01-01T00:00:00.000Z' WHERE due_at IS NOT NULL"


def write(database_url: str, statement: str) -> None:
    """Change the database behind the back of the servers, as if time had passed."""
    if database_url.startswith("sqlite:"):
        with contextlib.closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), timeout=60)) as database:
            database.execute(statement)
            database.commit()
        return
    import psycopg

    with psycopg.connect(database_url) as connection:
        connection.execute(statement)


async def until(is_so: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(SECONDS):
        while not await asyncio.to_thread(is_so):  # noqa: ASYNC110  (another process makes it so)
            await asyncio.sleep(0.1)
    assert is_so(), what


def make(admin: httpx2.Client, path: str, body: Any) -> Any:
    answer = admin.post(path, json=body)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def deliveries(admin: httpx2.Client, status: str = "") -> list[Any]:
    query = f"&status={status}" if status else ""
    return list(admin.get(f"/notifications/deliveries?limit=200{query}").raise_for_status().json()["items"])


def fail_tasks(server: ServerProcess, admin: httpx2.Client, agent: str, count: int) -> None:
    """Let a worker fail so many tasks of an agent."""
    for number in range(count):
        make(admin, "/tasks", {"title": f"task {number}", "agent_id": agent, "retry_policy": {"max_attempts": 1}})
    left = count
    worker = make(admin, "/workers/register", {"name": f"breaker {count}", "max_agents": 20})
    admin.patch(f"/admin/workers/{worker['id']}/approve", json={"is_approved": True}).raise_for_status()
    with server.client(worker["token"]) as client:
        make(client, f"/workers/{worker['id']}/heartbeat", {})
        while left:
            body = {"max_tasks": min(left, 20), "wait_seconds": 5}
            for claim in make(client, f"/workers/{worker['id']}/claim", body)["tasks"]:
                path, lease = f"/tasks/{claim['task']['id']}", {"lease_id": claim["lease_id"]}
                make(client, f"{path}/start", lease)
                make(client, f"{path}/fail", {**lease, "error": {"type": "broken", "message": "It broke."}})
                left -= 1


async def test_notifications_2_a_storm_over_a_killed_server_is_one_mail(
    tmp_path: Path, database_url: str, long_form: bool
) -> None:
    """Short form: 20 failures. Long form: 500. Half of them come before the server is killed."""
    failures = 500 if long_form else 20
    mails = MailServer().start()
    server = ServerProcess(tmp_path, database_url=database_url, arguments=ARGUMENTS, environ=ENVIRON)
    try:
        await asyncio.to_thread(server.start)
        admin = await asyncio.to_thread(server.sign_in)
        for name, value in {"host": "127.0.0.1", "port": mails.port, "security": "none"}.items():
            admin.put(f"/settings/mail/{name}", json={"value": value}).raise_for_status()
        channel = make(admin, "/notifications/channels", {"name": "x", "type": "email", "config": {"to": ["o@e.org"]}})
        rule = {"name": "x", "events": ["task.failed"], "channel_ids": [channel["id"]], "group_by": ["agent_id"]}
        make(admin, "/notifications/rules", {**rule, "group_wait_seconds": 3600})
        agent = make(admin, "/agents", {"name": "breaker"})["id"]
        make(admin, f"/agents/{agent}/start", {})
        await asyncio.to_thread(fail_tasks, server, admin, agent, failures // 2)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(fail_tasks, server, admin, agent, failures - failures // 2)
        await until(lambda: sum(row["count"] for row in deliveries(admin)) == failures, "all events are in messages")
        assert len(deliveries(admin)) == 1
        await asyncio.to_thread(write, database_url, IS_DUE)
        await until(lambda: bool(deliveries(admin, "succeeded")), "the message is sent")
        rows = admin.get("/notifications?limit=200&type=task.failed").raise_for_status().json()["items"]
    finally:
        await asyncio.to_thread(server.kill)
        mails.stop()
    [mail_sent] = mails.box.mails
    assert f"{failures} × task.failed" in mail_sent["Subject"]
    assert sum(row["count"] for row in rows) == failures


async def test_notifications_killed_servers_send_every_message_and_none_twice_at_a_time(
    tmp_path: Path, database_url: str, long_form: bool
) -> None:
    """Two processes send 20 messages and are killed twice; in the long form, 300 messages and ten kills."""
    events, kills = (300, 10) if long_form else (20, 2)
    server = ServerProcess(tmp_path, database_url=database_url, arguments=ARGUMENTS, environ=ENVIRON)
    async with Receiver() as first, Receiver() as second:
        receivers = (first, second)
        try:
            await asyncio.to_thread(server.start)
            admin = await asyncio.to_thread(server.sign_in)
            channels = []
            for each in receivers:
                body = {"name": each.url, "type": "webhook", "config": {"url": each.url}}
                channels.append(make(admin, "/notifications/channels", body))
            rule = {"name": "x", "events": ["task.created"], "channel_ids": [each["id"] for each in channels]}
            make(admin, "/notifications/rules", {**rule, "group_wait_seconds": 0, "in_app": False})
            first.seconds = second.seconds = 0.1
            for kill in range(kills + 1):
                for number in range(events // kills if kill < kills else 0):
                    await asyncio.to_thread(make, admin, "/tasks", {"title": f"task {kill}.{number}"})
                if kill < kills:
                    least = (kill + 1) * events // kills // 2
                    await asyncio.gather(*(each.wait_for(least, seconds=SECONDS) for each in receivers))
                    await asyncio.to_thread(server.kill)  # while it sends
                    await until(lambda: first.running + second.running == 0, "the receivers have noticed")
                    await asyncio.to_thread(write, database_url, NO_TIME_LEFT)
                    await asyncio.to_thread(server.start)
            done = events * len(receivers)

            def is_all_sent() -> bool:
                found = admin.get("/notifications/deliveries?limit=1&status=succeeded").raise_for_status().json()
                return bool(found["total"] == done)

            await until(is_all_sent, "all messages are sent")
        finally:
            await asyncio.to_thread(server.kill)
    for each in receivers:
        told = Counter(message.content["data"]["title"] for message in each.messages)
        assert len(told) == len(each.ids) == events, "every event is told"
        assert len(each.messages) - events <= kills, "a message comes twice only if the server was killed meanwhile"
        assert each.doubled == 0
        assert each.most_running == 1, "one message at a time through each channel"
        assert all(re.search(r"task \d+\.\d+", title) for title in told)
