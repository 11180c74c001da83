"""Budgets survive SIGKILL: criterion 3 of the page about costs, with a real server, real workers and a slow provider.

Short form: 2 kills on SQLite; long form (`--long`): 100 kills on each engine.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.plugins.llm import conftest as up
from tests.promises.test_r01_kill_the_server import read_log
from tests.promises.test_r02_kill_the_workers import WorkerProcess, open_tasks, prepare

from corral import clock
from corral.testing.server import ServerProcess

LEASE_SECONDS = 10
GRACE_SECONDS = 5
SLACK_SECONDS = 3  # for a busy machine
CONFIG = """
[plugins.llm.providers.up]
kind = "openai"
base_url = "{url}"
api_key = "{key}"
models = [{{ id = "m1" }}]
max_retries = 0
"""


async def slow(exchange: up.Exchange) -> None:
    """Respond so late that some calls are in flight when a process dies."""
    await asyncio.sleep(random.uniform(0.1, 0.6))
    await up.says("done")(exchange)


class Site:
    """A server with a budget, tasks whose model costs money, and workers that are killed."""

    def __init__(self, folder: Path, database_url: str, upstream: up.Upstream) -> None:
        (folder / "corral.toml").write_text(CONFIG.format(url=upstream.url, key=up.KEY))
        environ = {"CORRAL_CONFIG": str(folder / "corral.toml"), "CORRAL_TASK_LEASE_SECONDS": str(LEASE_SECONDS)}
        self.folder, self.server = folder, ServerProcess(folder, database_url=database_url, environ=environ)
        self.workers: list[WorkerProcess] = []
        self.ready_at = 0.0

    def start(self, tasks: int) -> httpx2.Client:
        """Start everything; a client of the admin."""
        self._start_server()
        signed_in = self.server.sign_in()
        made = signed_in.post("/security/api-keys", json={"name": "judge", "scopes": ["*"]}).raise_for_status()
        admin = self.server.client(made.json()["key"])
        admin.put("/settings/llm/default_model", json={"value": "up/m1"}).raise_for_status()
        price = {"provider": "up", "model": "*", "input_usd": 0, "output_usd": 1000}
        admin.post("/cost/prices", json=price).raise_for_status()
        admin.put("/cost/budget", json={"monthly_limit": 1000}).raise_for_status()
        key = prepare(self.server, admin, tasks)
        self.workers = [WorkerProcess(self.server, self.folder, f"w{n}", key) for n in range(2)]
        for worker in self.workers:
            worker.start()
        return admin

    def _start_server(self) -> None:
        self.server.start()
        self.ready_at = time.time()

    def kill_one(self, n: int) -> None:
        """Kill and restart the server, or a worker."""
        if n % 2 == 0:
            self.server.kill()
            self._start_server()
        else:
            self.workers[n // 2 % 2].kill()
            self.workers[n // 2 % 2].start()

    def stop(self) -> None:
        """Kill everything."""
        for worker in self.workers:
            if worker.process is not None and worker.process.poll() is None:
                worker.kill()
        self.server.kill()


def pages(admin: httpx2.Client, path: str) -> list[Any]:
    """All rows of a list."""
    found: list[Any] = []
    cursor = None
    while True:
        query = {"limit": 200, **({"cursor": cursor} if cursor else {})}
        page = admin.get(path, params=query).raise_for_status().json()
        found += page["items"]
        cursor = page["next"]
        if cursor is None:
            return found


def overdue_seconds(admin: httpx2.Client, ready_at: float) -> float:
    """How long the oldest reservation has outlived its lease and the grace period, while the server was running."""
    ends = [clock.parse_instant(each["expires_at"]) for each in pages(admin, "/cost/reservations")]
    return time.time() - max(min(ends, default=time.time()), ready_at + GRACE_SECONDS)


def judge(admin: httpx2.Client) -> None:
    """Every call that was settled has exactly one event, and the counters are the sums."""
    events = [event for event in pages(admin, "/cost/events") if event["provider"] == "up"]
    settled = {call["id"]: call["cost_usd"] for call in pages(admin, "/llm/calls") if call["cost_usd"] is not None}
    assert Counter(event["usage_key"] for event in events) == dict.fromkeys(settled, 1)
    assert {event["usage_key"]: event["cost_usd"] for event in events} == settled
    spent = sum(round(event["cost_usd"] * 1e6) for event in events)
    budget = admin.get("/cost/budget").raise_for_status().json()
    assert (round(budget["spent_usd"] * 1e6), budget["reserved_usd"]) == (spent, 0)
    alerts = [event for event in read_log(admin) if event["event"] == "system.alert"]
    assert not [alert for alert in alerts if alert["data"]["kind"] == "cost_mismatch"]


@pytest.mark.one_engine
async def test_cost_3_nothing_is_lost_or_held_when_processes_are_killed(
    database_url: str, tmp_path: Path, upstream: up.Upstream, long_form: bool
) -> None:
    random.seed(3)
    kills, tasks = (100, 400) if long_form else (2, 8)
    upstream.otherwise = slow
    site = Site(tmp_path, database_url, upstream)
    try:
        admin = await asyncio.to_thread(site.start, tasks)
        for n in range(kills):
            await asyncio.sleep(random.uniform(0.5, 1.5))
            await asyncio.to_thread(site.kill_one, n)
            assert await asyncio.to_thread(overdue_seconds, admin, site.ready_at) <= SLACK_SECONDS
        until = time.monotonic() + 120
        while await asyncio.to_thread(open_tasks, admin):
            assert time.monotonic() < until, site.server.log[-2000:]
            assert await asyncio.to_thread(overdue_seconds, admin, site.ready_at) <= SLACK_SECONDS
            await asyncio.sleep(0.5)
        assert await asyncio.to_thread(pages, admin, "/cost/reservations") == []
        await asyncio.to_thread(judge, admin)
    finally:
        await asyncio.to_thread(site.stop)
