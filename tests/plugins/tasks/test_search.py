"""The search, before and after the words are indexed."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from tests.engines import SQLITE

from corral import clock
from corral.database.dialect import execute
from corral_plugins.tasks import jobs
from corral_plugins.tasks.service import queries


async def found(world: Any, query: str) -> list[str]:
    answer = await world.member.get(f"/tasks?{query}")
    assert answer.status == 200, answer
    return [item["id"] for item in answer.json()["items"]]


async def index(world: Any) -> None:
    """As the schedule does, a minute later."""
    clock.travel(60)
    await jobs.index_new_tasks(world.kit.kernel.database.work)
    world.member = await world.kit.sign_in(world.member.user["email"])


async def check(world: Any, ids: list[str]) -> None:
    first, second, third = ids
    assert await found(world, "search=NEEDLE") == [second, first]
    assert await found(world, "search=need") == [second, first]
    assert await found(world, "search=hay%20needle") == [first]
    assert await found(world, f"search={quote('sträng')}") == [third]
    assert await found(world, "search=eedle") == []
    assert await found(world, "search=needle&priority=high") == [second]
    assert await found(world, "search=needle&sort=updated&limit=1") == [second]
    for odd in ('"', "*", "a OR", "-x", "%", "NEAR(", "':*", "title:needle (", "\\", "a & !b"):
        await found(world, f"search={quote(odd)}")


async def test_words_are_found_before_and_after_they_are_indexed(world: Any) -> None:
    ids = [
        await world.task("a needle", description="in the hay-stack"),
        await world.task("other", description="foo/needles, 2 of them", priority="high"),
        await world.task("Strängnäs"),
    ]
    await check(world, ids)
    await index(world)
    await check(world, ids)
    await world.task("the newest needle")
    assert len(await found(world, "search=needle")) == 3


@SQLITE
async def test_the_index_is_merged_when_all_tasks_are_in_it(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "INDEX_CHUNK", 1)  # each makes a segment
    ids = [await world.task(f"needle {n}") for n in range(3)]
    await index(world)
    database = world.kit.kernel.database
    await jobs.index_new_tasks(database.work)
    segments = "SELECT COUNT(DISTINCT segid) FROM tasks_search_idx"
    assert (await database.work(lambda: execute(segments).fetchone())) == (1,)
    assert await found(world, "search=needle") == ids[::-1]


async def test_changed_and_deleted_texts(world: Any) -> None:
    ids = [await world.task(f"needle {n}") for n in range(3)]
    await index(world)
    assert (await world.member.patch(f"/tasks/{ids[1]}", {"title": "pin"})).status == 200
    assert await found(world, "search=needle") == [ids[2], ids[0]]
    assert await found(world, "search=pin") == [ids[1]]
    for task_id in (ids[2], ids[1]):
        await world.member.post(f"/tasks/{task_id}/cancel")
        assert (await world.member.delete(f"/tasks/{task_id}")).status == 204
    assert await found(world, "search=needle") == [ids[0]]
    assert await found(world, "search=pin") == []
    again = await world.task("needle again")
    await index(world)
    assert await found(world, "search=needle") == [again, ids[0]]


async def test_pages_of_a_search_visit_each_match_once(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "INDEX_CHUNK", 3)
    ids = [await world.task(f"needle {n}" if n % 2 else "hay") for n in range(16)][1::2]
    await index(world)
    ids += [await world.task(f"needle {n}") for n in range(5)]
    ids.reverse()
    seen, query = [], "search=needle&limit=3"
    while query:
        page = (await world.member.get(f"/tasks?{query}")).json()
        assert page["total"] == 13
        seen += [item["id"] for item in page["items"]]
        query = f"search=needle&limit=3&cursor={page['next']}" if page["next"] else ""
    assert seen == ids
    for offset in range(15):
        assert await found(world, f"search=needle&limit=4&offset={offset}") == ids[offset : offset + 4], offset


async def test_only_the_newest_matches_are_counted(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [await world.task(f"needle {n}") for n in range(5)][::-1]
    await index(world)
    monkeypatch.setattr(queries, "MAX_MATCHES", 3)
    page = (await world.member.get("/tasks?search=needle&limit=2")).json()
    assert (page["total"], [item["id"] for item in page["items"]]) == (3, ids[:2])
    assert await found(world, "search=needle&priority=medium") == ids[:3]
