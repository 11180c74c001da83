"""Lists by tag: what a task's owner changes, what is deleted, and tasks from before the tags had a table."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.tasks.conftest import World

from corral.testing.kit import make_kernel
from corral_plugins.tasks.service import filters

OLD_SCHEMA = """
DROP TABLE tasks_tags;
DROP INDEX tasks_tasks_source_type_created_at_id;
CREATE INDEX tasks_tasks_source ON tasks_tasks (source_type, created_at, id) WHERE source_type NOT IN ('user', 'api');
DELETE FROM tasks_migrations WHERE name = '0002_tags_and_sources';
"""


async def tagged(world: Any, query: str) -> tuple[list[str], int]:
    """The ids and the total of a list."""
    answer = await world.member.get(f"/tasks?{query}")
    assert answer.status == 200, answer
    found = answer.json()
    return [item["id"] for item in found["items"]], found["total"]


@pytest.mark.parametrize("few", [0, 8000], ids=["in the order of the list", "by the tags"])
async def test_tags_follow_the_task(world: Any, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(filters, "FEW", few)
    one = await world.task("one", tags=["red", " a b ", "red\u3000"])
    assert (await world.read(one))["tags"] == ["red", "a b"]
    two = await world.task("two", tags=["red", "green"], priority="high")
    await world.task("three")
    assert await tagged(world, "tag=red") == ([two, one], 2)
    assert await tagged(world, "tag=red&tag=green") == ([two, one], 2)
    assert await tagged(world, "tag=a%20b") == ([one], 1)
    assert await tagged(world, "tag=re") == ([], 0)
    assert await tagged(world, "tag=red&priority=high&sort=updated") == ([two], 1)
    assert await tagged(world, "tag=red&sort=priority&limit=1") == ([two], 2)
    assert (await world.member.patch(f"/tasks/{two}", {"tags": [" blue", "blue"]})).json()["tags"] == ["blue"]
    for blank in (
        await world.member.post("/tasks", {"title": "x", "tags": ["a", "  "]}),
        await world.member.patch(f"/tasks/{two}", {"tags": ["a", "\u3000"]}),
    ):
        assert (blank.status, blank.json()["errors"][0]["pointer"]) == (422, "/tags/1")
    assert await tagged(world, "tag=red&tag=green") == ([one], 1)
    assert await tagged(world, "tag=blue") == ([two], 1)
    assert (await world.member.patch(f"/tasks/{two}", {"title": "2"})).status == 200
    assert await tagged(world, "tag=blue") == ([two], 1)
    await world.member.post(f"/tasks/{one}/cancel")
    assert (await world.member.delete(f"/tasks/{one}")).status == 204
    assert await tagged(world, "tag=red") == ([], 0)
    assert (await world.member.patch(f"/tasks/{two}", {"tags": []})).status == 200
    assert await tagged(world, "tag=blue") == ([], 0)


async def test_changes_that_are_committed_together_keep_their_order(world: Any) -> None:
    one = await world.task("one", tags=["old"])
    changes = [["a", "b"], ["b"], [], ["c", "b"]]
    told = await asyncio.gather(*[world.member.patch(f"/tasks/{one}", {"tags": tags}) for tags in changes])
    assert {answer.status for answer in told} == {200}
    tags = (await world.member.get(f"/tasks/{one}")).json()["tags"]
    for tag in ("old", "a", "b", "c"):
        assert await tagged(world, f"tag={tag}") == (([one], 1) if tag in tags else ([], 0))


@pytest.mark.sqlite
@pytest.mark.one_engine
async def test_tasks_of_the_former_schema_are_found_by_their_tags(tmp_path: Path) -> None:
    plugins = ("admin", "agents", "workers", "tasks")
    async with make_kernel(tmp_path, plugins=plugins) as kit:
        world = await World().build(kit)
        ids = [await world.task(f"task {n}", tags=["all", f"n{n % 3}"]) for n in range(7)]
        email = world.member.user["email"]
    await asyncio.to_thread(to_old_schema, tmp_path)
    async with make_kernel(tmp_path, plugins=plugins) as kit:
        world.member = await kit.sign_in(email)
        assert await tagged(world, "tag=all") == (ids[::-1], 7)
        assert await tagged(world, "tag=n1") == ([ids[4], ids[1]], 2)


def to_old_schema(folder: Path) -> None:
    connection = sqlite3.connect(next(folder.rglob("corral.db")))
    connection.executescript(OLD_SCHEMA)
    connection.close()
