"""Triggers in real processes: three at once, and killed with SIGKILL while they fire.

Short form: 40 slots on three processes, then 2 kills during 30 slots. Long form (`--long`): 1,000 slots, and 100 kills.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
from tests.plugins.triggers.conftest import TASK

from corral import clock
from corral.testing.server import ServerProcess

SECONDS = 60.0
SPREAD_SECONDS = 1.5


class Slots:
    """`once` triggers that are due soon, and what became of them."""

    def __init__(self, admin: httpx2.Client) -> None:
        self.admin = admin
        self.ids: list[str] = []

    def add(self, count: int, *, spread: float, delay: float = 1.0) -> None:
        """Create triggers that are due within `spread` seconds after all of them exist."""
        begin = time.time() + delay + count * 0.1  # creating them takes this long on a busy machine
        for number in range(count):
            at = clock.format_instant(begin + spread * number / count)
            body: dict[str, Any] = {"name": f"slot {number}", "type": "once", "config": {"at": at}, "action": TASK}
            answer = self.admin.post("/triggers", json=body)
            while answer.status_code == 422:  # creating the others took longer than that
                body["config"] = {"at": clock.format_instant(time.time() + 1)}
                answer = self.admin.post("/triggers", json=body)
            assert answer.status_code == 201, answer.text
            self.ids.append(answer.json()["id"])

    def wait(self) -> None:
        """Wait until all are decided. The number of tasks tells it cheaply, because reading each history is slow."""
        until = time.monotonic() + SECONDS + len(self.ids) / 10
        while (count := self.admin.get("/tasks?limit=1").json()["total"]) < len(self.ids):
            assert time.monotonic() < until, f"{len(self.ids) - count} slots are open"
            time.sleep(0.3)

    def judge(self) -> None:
        """Each slot has one row, and its one task; no task was made twice."""
        tasks: Counter[str] = Counter()
        for trigger_id in self.ids:
            rows = self.admin.get(f"/triggers/{trigger_id}/history").json()["items"]
            assert [row["status"] for row in rows] == ["fired"], rows
            tasks[rows[0]["result"]["task_id"]] += 1
        assert set(tasks.values()) == {1}
        assert self.admin.get("/tasks?limit=1").json()["total"] == len(self.ids)


def allow_many(admin: httpx2.Client) -> None:
    answer = admin.put("/settings/triggers/max_per_user", json={"value": 10_000})
    assert answer.status_code == 200, answer.text


def test_three_processes_fire_each_slot_once(tmp_path: Path, database_url: str, long_form: bool) -> None:
    slots = 1000 if long_form else 40
    arguments = ("--no-embedded-worker", "--processes", "3")
    with ServerProcess(tmp_path, database_url=database_url, arguments=arguments) as server:
        admin = server.sign_in()
        allow_many(admin)
        found = Slots(admin)
        found.add(slots, spread=slots / 100)
        found.wait()
        found.judge()
        rows: list[Any] = [admin.get(f"/triggers/{each}/history").json()["items"][0] for each in found.ids]
        late = sorted(clock.elapsed_ms(row["scheduled_for"], row["fired_at"]) for row in rows)
        print(f"{slots} slots, late p50 {late[len(late) // 2]} ms, p99 {late[int(len(late) * 0.99)]} ms")


def test_triggers_3_a_kill_leaves_a_slot_with_one_row_and_one_task(
    tmp_path: Path, database_url: str, long_form: bool
) -> None:
    kills = 100 if long_form else 2
    chosen = random.Random(3)
    with ServerProcess(tmp_path, database_url=database_url) as server:
        allow_many(server.sign_in())
        found = Slots(server.sign_in())
        for _ in range(kills):
            found.admin = server.sign_in()
            found.add(15, spread=SPREAD_SECONDS, delay=0.3)
            time.sleep(chosen.uniform(0.3, SPREAD_SECONDS + 0.5))
            server.kill()
            server.start()
        found.admin = server.sign_in()
        found.wait()
        found.judge()
