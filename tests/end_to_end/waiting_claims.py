"""A worker that waits for a task at one process, while the task is created at another."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
from tests.limits import Stopwatch

from corral.testing.server import ServerProcess

CLAIMS = 4  # of as many workers on connections of their own: processes on one address share them by chance
MAX_SECONDS = 1.0  # and what a crowded machine takes by itself


def check_new_tasks_reach_waiting_claims(
    waiting_at: ServerProcess, created_at: ServerProcess, admin: httpx2.Client, *, name: str
) -> None:
    """`workers` 7: what is created while claims wait arrives within a second."""
    body = {"name": f"waited for, {name}", "max_concurrent_tasks": CLAIMS}
    agent = admin.post("/agents", json=body).raise_for_status().json()["id"]
    admin.post(f"/agents/{agent}/start").raise_for_status()
    workers = [_worker(waiting_at, admin, f"waiting {number}, {name}") for number in range(CLAIMS)]
    barrier, arrived = threading.Barrier(CLAIMS + 1), []

    def claim(worker_id: str, token: str) -> None:
        with waiting_at.client(token) as client:
            barrier.wait()
            wanted = {"wait_seconds": 30, "agent_ids": [agent]}
            answer = client.post(f"/workers/{worker_id}/claim", json=wanted, timeout=90).raise_for_status().json()
            arrived.append((answer["tasks"][0]["task"]["title"], watch.seconds))

    created: dict[str, float] = {}
    with ThreadPoolExecutor(CLAIMS) as pool, Stopwatch() as watch:
        claims = [pool.submit(claim, *worker) for worker in workers]
        barrier.wait()
        time.sleep(0.5)
        assert arrived == []
        for number in range(CLAIMS):
            with created_at.client(admin.headers["Authorization"].removeprefix("Bearer ")) as client:
                created[f"task {number}"] = watch.seconds
                task = {"title": f"task {number}", "agent_id": agent}
                client.post("/tasks", json=task).raise_for_status()
        for each in claims:
            each.result(timeout=90)
    assert {title for title, _ in arrived} == created.keys()
    assert max(moment - created[title] for title, moment in arrived) <= MAX_SECONDS + os.getloadavg()[0] / 4


def _worker(server: ServerProcess, admin: httpx2.Client, name: str) -> tuple[str, str]:
    """The id and the token of an approved worker."""
    made = admin.post("/workers/register", json={"name": name}).raise_for_status().json()
    admin.patch(f"/admin/workers/{made['id']}/approve", json={"is_approved": True}).raise_for_status()
    with server.client(made["token"]) as client:
        client.post(f"/workers/{made['id']}/heartbeat", json={}).raise_for_status()
    return made["id"], made["token"]
