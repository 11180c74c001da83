"""Summaries and breakdowns: days of time zones, names, order, and wasted costs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import pytest_asyncio
from tests.plugins.cost.conftest import Books
from tests.plugins.tasks.conftest import World
from tests.shared_kernels import on_the_loop_of_the_module

from corral import clock
from corral.events.log import LoggedEvent
from corral.ids import new_id
from corral_plugins.cost.service import rollups
from corral_plugins.cost.service.day_buckets import QUARTER_HOUR, day_number, offset_spans

ZONES = ("UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns", "Australia/Lord_Howe", "Africa/Casablanca")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_books(make_shared_kit: Callable[..., Any]) -> Books:
    """Books for the tests without an event."""
    return await Books().build(await make_shared_kit(plugins=["cost"]))


def at(instant: str) -> None:
    """Set the clock."""
    clock.travel(clock.parse_instant(instant) - clock.time_s())


async def sign_in_at(books: Books, instant: str) -> None:
    at(instant)
    await books.pass_days(0)


@pytest.mark.parametrize("name", ZONES)
def test_a_year_is_split_into_days_of_the_zone(name: str) -> None:
    where = ZoneInfo(name)
    first, last = date(2025, 3, 1), date(2026, 4, 10)
    pieces = offset_spans(first, last, where)
    assert [piece.end for piece in pieces[:-1]] == [piece.first for piece in pieces[1:]]
    for piece in pieces:
        for quarter in range(piece.first, piece.end):
            local = datetime.fromtimestamp(quarter * QUARTER_HOUR, UTC).astimezone(where)
            assert (quarter + piece.offset) // 96 == day_number(local.date())
    begin = datetime.fromtimestamp(pieces[0].first * QUARTER_HOUR, UTC).astimezone(where)
    end = datetime.fromtimestamp(pieces[-1].end * QUARTER_HOUR, UTC).astimezone(where)
    assert (begin.date(), begin.hour, end.date(), end.hour) == (first, 0, last + timedelta(days=1), 0)


async def test_days_are_those_of_the_zone(books: Books) -> None:
    await sign_in_at(books, "2026-10-24T21:50:00Z")  # 23:50 in Berlin, 03:35 of the 25th in Kathmandu
    await books.settle("1")
    at("2026-10-25T22:59:00Z")  # 23:59 in Berlin: the 25th has 25 hours there
    await books.settle("2")
    await sign_in_at(books, "2026-10-25T23:01:00Z")
    await books.settle("4")

    async def days(tz: str) -> list[float]:
        return [item["cost_usd"] for item in (await books.read(f"daily?days=3&tz={tz}"))["items"]]

    assert await days("UTC") == [0, 1, 6]
    assert await days("Europe/Berlin") == [1, 2, 4]
    assert await days("Asia/Kathmandu") == [0, 1, 6]
    assert (await books.read("summary?tz=Europe/Berlin"))["today_usd"] == 4
    refused = await books.member.get("/cost/daily?tz=Mars/Olympus")
    assert (refused.status, refused.json()["errors"][0]["pointer"]) == (422, "/query/tz")


async def test_the_summary_tells_the_periods(books: Books) -> None:
    for instant, usd in (
        ("2026-08-31T12:00:00Z", "100"),
        ("2026-09-01T00:00:00Z", "10"),
        ("2026-09-30T23:59:59Z", "10"),
        ("2026-10-01T00:00:00Z", "1"),
        ("2026-10-19T00:00:00Z", "2"),
        ("2026-10-21T00:30:00Z", "4"),
    ):
        at(instant)
        await books.settle(usd, input_tokens=3, output_tokens=2, cache_read_tokens=4, cache_write_tokens=1)
    await books.settle(input_tokens=5, cache_read_tokens=6)
    await sign_in_at(books, "2026-10-21T12:00:00Z")  # a Wednesday
    summary = await books.read("summary")
    assert summary.pop("as_of").startswith("2026-10-21T12:00")
    assert summary == {
        "today_usd": 4,
        "week_usd": 6,
        "month_usd": 7,
        "last_month_usd": 20,
        "total_usd": 127,
        "change_percent": -65,
        "tokens": {"input": 23, "output": 12, "cache_read": 30, "cache_write": 6},
        "unpriced_tokens": 11,
        "unpriced_calls": 1,
        "wasted_usd": 0,
        "cost_per_completed_task_usd": None,
    }


async def test_daily_can_be_of_an_agent_or_a_provider(books: Books) -> None:
    agent = new_id()
    await books.settle("1", agent_id=agent)
    await books.settle("2", agent_id=agent, provider="other")
    await books.settle("4")

    async def today(query: str) -> tuple[float, int]:
        (item,) = (await books.read(f"daily?days=1{query}"))["items"]
        items = (await books.read(f"daily?days=2&tz=Asia/Kathmandu{query}"))["items"]  # made of quarters
        assert (sum(each["cost_usd"] for each in items), sum(each["calls"] for each in items)) == (
            item["cost_usd"],
            item["calls"],
        )
        return item["cost_usd"], item["calls"]

    assert await today("") == (7, 3)
    assert await today(f"&agent_id={agent.upper()}") == (3, 2)
    assert await today("&provider=acme") == (5, 2)
    assert await today(f"&agent_id={agent}&provider=other") == (2, 1)
    assert await today(f"&agent_id={new_id()}") == (0, 0)


@pytest.mark.one_engine
async def test_a_task_counts_once_for_each_agent(books: Books) -> None:
    agents, task = [new_id(), new_id()], new_id()
    for n in range(4):
        await books.settle("1", agent_id=agents[n % 2], task_id=task)
    await books.settle("1", agent_id=agents[0], task_id=new_id())
    await books.pass_days(1)
    await books.settle("1", agent_id=agents[0], task_id=task)
    items = (await books.read("by-agent"))["items"]
    assert [(item["agent_id"], item["tasks"]) for item in items] == [(agents[0], 2), (agents[1], 1)]
    assert await books.work(lambda: books.cost.spent_on_task(task)) == 5_000_000


async def test_breakdowns_name_the_most_expensive_first(books: Books) -> None:
    person, tasks = books.member.user["id"], [new_id() for _ in range(3)]
    await books.settle("1", task_id=tasks[0], agent_id=new_id(), user_id=person)
    await books.settle("3", task_id=tasks[1], agent_id=new_id(), provider="other")
    await books.settle("2", task_id=tasks[1], agent_id=new_id(), provider="other", model="two")
    await books.settle(task_id=tasks[2], input_tokens=9)
    by_task = await books.read("by-task?limit=2")
    assert [(item["task_id"], item["cost_usd"]) for item in by_task["items"]] == [(tasks[1], 5), (tasks[0], 1)]
    assert (by_task["total"], (await books.read("by-task?offset=2"))["items"][0]["task_id"]) == (3, tasks[2])
    by_model = await books.read("by-model")
    assert [(item["provider"], item["model"]) for item in by_model["items"]] == [
        ("other", "one"),
        ("other", "two"),
        ("acme", "one"),
    ]
    by_provider = await books.read("by-provider")
    assert [(item["provider"], item["cost_usd"], len(item["models"])) for item in by_provider["items"]] == [
        ("other", 5, 2),
        ("acme", 1, 1),
    ]
    assert (by_provider["items"][1]["unpriced_tokens"], by_provider["total_usd"]) == (9, 6)
    by_user = await books.read("by-user", by=books.admin)
    assert [(item["user_id"], item["name"], item["cost_usd"]) for item in by_user["items"]] == [
        (None, None, 5),
        (person, "Member 2", 1),
    ]
    assert (await books.member.get("/cost/by-user")).status == 403


@pytest.mark.one_engine
@pytest.mark.parametrize("path", ["summary", "daily", "by-agent", "by-provider", "by-task", "by-model", "by-user"])
@on_the_loop_of_the_module
async def test_every_report_is_there_before_the_first_event(shared_books: Books, path: str) -> None:
    await shared_books.read(path, by=shared_books.admin)
    for query in ("days=0", "days=366", "what=1"):
        if path != "summary":
            assert (await shared_books.admin.get(f"/cost/{path}?{query}")).status == 422
    assert (await (await shared_books.kit.as_user("auditor")).get(f"/cost/{path}")).status == 403


async def told(world: World, after: int = 0) -> int:
    """Feed new events to the subscriber; returns the position in the event log."""
    events: list[LoggedEvent] = await world.kit.events(after=after)
    for event in events:
        if event.type in rollups.OUTCOME_EVENTS:
            await world.kit.kernel.database.work(lambda event=event: rollups.record_outcome_event(event))  # type: ignore[misc]  # bound now
    return events[-1].seq if events else after


async def test_what_became_of_the_money(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=("admin", "agents", "workers", "tasks", "cost"))
    world, books = await World().build(kit), await Books().build(kit)
    usage = {"usage": {"input_tokens": 10, "cost_usd": 0.5}}
    await world.task()
    await (await world.worker.run()).ok("complete", {"result": 1, **usage})
    twice = await world.task(retry_policy={"max_attempts": 2, "initial_seconds": 0})
    await (await world.worker.run()).ok("fail", {"error": {"type": "boom"}, **usage})
    await world.pass_time(1)
    await (await world.worker.run()).ok("complete", {"result": 1, **usage})
    place = await told(world)
    summary = await books.read("summary")
    assert (summary["total_usd"], summary["wasted_usd"], summary["cost_per_completed_task_usd"]) == (1.5, 0.5, 0.75)
    cancelled = await world.task()
    lease = await world.worker.run()
    await lease.ok("progress", usage)
    assert (await world.member.post(f"/tasks/{cancelled}/cancel", {})).status == 202
    await lease.ok("cancelled", {"usage": {"input_tokens": 10, "cost_usd": 0.75}})
    await told(world, place)
    assert (await books.read("summary"))["wasted_usd"] == 1.25
    (agent,) = (await books.read("by-agent"))["items"]
    assert (agent["agent_id"], agent["name"], agent["deleted"]) == (world.agent_id, "runner", False)
    assert (agent["cost_usd"], agent["tasks"], agent["budget"]) == (2.25, 3, None)
    assert agent["cost_per_completed_task_usd"] == 1.125
    for path in (f"/agents/{world.agent_id}", "/agents"):
        view = (await books.member.get(path)).json()
        assert view.get("items", [view])[0]["spent_month_usd"] == 2.25
    of_task = await books.read(f"events?task_id={twice}")
    assert [event["cost_usd"] for event in of_task["items"]] == [0.5, 0.5]
    assert len({event["attempt_id"] for event in of_task["items"]}) == 2
    await books.pass_days(32)
    assert (await books.member.get(f"/agents/{world.agent_id}")).json()["spent_month_usd"] == 0


async def test_a_deleted_agent_keeps_its_name_and_costs(make_kit: Callable[..., Any]) -> None:
    kit = await make_kit(plugins=("admin", "agents", "workers", "tasks", "cost"))
    world, books = await World().build(kit), await Books().build(kit)
    await books.settle("1", agent_id=world.agent_id)
    assert (await world.member.delete(f"/agents/{world.agent_id}?force=true")).status == 204
    await told(world)
    (agent,) = (await books.read("by-agent"))["items"]
    assert (agent["name"], agent["deleted"], agent["cost_usd"]) == ("runner", True, 1)
