"""Costs of workers outside the gateway become cost events and count for the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.cost.conftest import Books
from tests.plugins.tasks.conftest import Lease, World

from corral.testing.kit import Client

ITEM = {
    "usage_key": "search-1",
    "provider": "acme",
    "model": "one",
    "operation": "tool",
    "input_tokens": 10,
    "output_tokens": 5,
    "cache_read_tokens": 3,
    "cost_usd": 0.25,
}


class Place(World):
    """A world with the `cost` plugin."""

    books: Books

    async def build(self, kit: Any) -> Place:
        await super().build(kit)
        self.books = await Books().build(kit)
        return self

    async def events(self, task_id: str) -> list[Any]:
        """Return the task's cost events, oldest first."""
        items: list[Any] = (await self.books.read(f"events?task_id={task_id}"))["items"]
        return items[::-1]

    async def tally(self, task_id: str) -> tuple[Any, ...]:
        """Return `(usd, unpriced tokens, input, output, calls)` of the task, which must agree with the rollups."""
        cost = (await self.read(task_id))["cost"]
        spent = await self.books.work(lambda: self.books.cost.spent_on_task(task_id))
        assert spent == round(cost["cost_usd"] * 1e6)
        return tuple(cost[name] for name in ("cost_usd", "unpriced_tokens", "input_tokens", "output_tokens", "calls"))


@pytest.fixture
async def place(make_kit: Callable[..., Any]) -> Place:
    return await Place().build(await make_kit(plugins=("admin", "agents", "workers", "tasks", "cost")))


async def running(place: Place) -> Lease:
    await place.task()
    return await place.worker.run()


@pytest.mark.one_engine
async def test_single_uses_count_once(place: Place) -> None:
    lease = await running(place)
    await lease.ok("progress", {"usage": [ITEM, ITEM]})
    await lease.ok("progress", {"usage": [ITEM, {**ITEM, "usage_key": "search-2", "cost_usd": None}]})
    await lease.ok("complete", {"result": 1, "usage": [{**ITEM, "usage_key": "search-3"}]})
    events = await place.events(lease.task_id)
    assert [(event["usage_key"], event["cost_usd"]) for event in events] == [
        ("search-1", 0.25),
        ("search-2", None),
        ("search-3", 0.25),
    ]
    first = events[0]
    assert (first["agent_id"], first["task_id"]) == (place.agent_id, lease.task_id)
    assert (first["user_id"], first["operation"]) == (place.member.user["id"], "tool")
    attempt = (await place.member.get(f"/tasks/{lease.task_id}/attempts/1")).json()
    assert (first["attempt_id"], attempt["cost_usd"]) == (attempt["id"], 0.5)
    assert await place.tally(lease.task_id) == (0.5, 18, 39, 15, 3)


@pytest.mark.one_engine
async def test_totals_become_events_of_what_is_new(place: Place) -> None:
    lease = await running(place)
    told = {"usage": {"input_tokens": 5, "output_tokens": 1, "calls": 1, "cost_usd": 0.5}}
    await lease.ok("progress", told)
    await lease.ok("progress", told)
    more = {"usage": {"input_tokens": 8, "output_tokens": 1, "calls": 2, "cost_usd": 0.6}}
    await lease.ok("fail", {"error": {"type": "boom"}, **more})
    events = await place.events(lease.task_id)
    assert [(event["input_tokens"], event["cost_usd"]) for event in events] == [(5, 0.5), (3, 0.1)]
    assert {event["provider"] for event in events} == {"worker"}
    assert await place.tally(lease.task_id) == (0.6, 0, 8, 1, 2)


async def test_totals_without_a_cost_have_no_price(place: Place) -> None:
    lease = await running(place)
    await lease.ok("release", {"usage": {"input_tokens": 5, "output_tokens": 1}})
    (event,) = await place.events(lease.task_id)
    assert (event["cost_usd"], event["priced"]) == (None, False)
    assert await place.tally(lease.task_id) == (0, 6, 5, 1, 0)


async def test_a_price_of_the_tables_is_the_task_s_too(place: Place) -> None:
    lease = await running(place)
    item = {"usage_key": "own-key", "provider": "openai", "model": "gpt-4o", "input_tokens": 1_000_000}
    await lease.ok("complete", {"result": 1, "usage": [item]})
    assert await place.tally(lease.task_id) == (2.5, 0, 1_000_000, 0, 1)


@pytest.mark.parametrize("call", ["progress", "complete", "fail", "release", "cancelled"])
async def test_what_a_lost_lease_spent_is_recorded(place: Place, call: str) -> None:
    lease = await running(place)
    await place.pass_time(90)
    body: dict[str, Any] = {"error": {"type": "x"}} if call == "fail" else {}
    lost = await lease.call(call, {**body, "usage": [ITEM]})
    assert (lost.status, lost.code) == (409, "lease_lost")
    assert [event["cost_usd"] for event in await place.events(lease.task_id)] == [0.25]
    assert await place.tally(lease.task_id) == (0.25, 0, 13, 5, 1)


@pytest.mark.one_engine
@pytest.mark.parametrize(
    "change", [{"input_tokens": -1}, {"output_tokens": 100_000_001}, {"cost_usd": -0.1}, {"usage_key": ""}]
)
async def test_absurd_reports_are_refused(place: Place, change: dict[str, Any]) -> None:
    lease = await running(place)
    refused = await lease.call("progress", {"usage": [{**ITEM, **change}]})
    assert (refused.status, refused.code) == (422, "validation_error")
    totals = await lease.call("progress", {"usage": {"input_tokens": 100_000_001}})
    assert totals.status == 422
    assert await place.events(lease.task_id) == []


async def test_without_the_plugin_single_uses_still_count_once(make_kit: Callable[..., Any]) -> None:
    world = await World().build(await make_kit(plugins=("admin", "agents", "workers", "tasks")))
    task_id = await world.task()
    lease = await world.worker.run()
    await lease.ok("progress", {"usage": [ITEM, ITEM]})
    await lease.ok("progress", {"usage": {"input_tokens": 1, "cost_usd": 0.5}})
    await lease.ok("progress", {"usage": [ITEM, {**ITEM, "usage_key": "b", "cost_usd": None}]})
    cost = (await world.read(task_id))["cost"]
    assert cost == {"cost_usd": 0.75, "unpriced_tokens": 18, "input_tokens": 27, "output_tokens": 10, "calls": 2}


# -- POST /cost/events under a lease


async def test_a_worker_and_its_agent_report_by_the_event_route(place: Place) -> None:
    lease = await running(place)
    by_worker = await place.worker.client.post(
        "/cost/events", {**ITEM, "task_id": lease.task_id, "lease_id": lease.lease_id}
    )
    assert by_worker.status == 201, by_worker
    assert (by_worker.json()["task_id"], by_worker.json()["agent_id"]) == (lease.task_id, place.agent_id)
    agent = Client(place.kit.application.app, lease.claim["agent_token"])
    by_agent = await agent.post("/cost/events", {**ITEM, "usage_key": "by-token", "agent_id": None})
    assert by_agent.status == 201, by_agent
    again = await place.worker.client.post(
        "/cost/events", {**ITEM, "task_id": lease.task_id}, headers={"corral-lease": lease.lease_id}
    )
    assert (again.status, again.json()["id"]) == (200, by_worker.json()["id"])
    assert await place.tally(lease.task_id) == (0.5, 0, 26, 10, 2)


@pytest.mark.one_engine
async def test_a_late_report_is_recorded_and_answered_409(place: Place) -> None:
    lease = await running(place)
    await place.pass_time(90)
    body = {**ITEM, "task_id": lease.task_id, "lease_id": lease.lease_id}
    for _ in range(2):
        late = await place.worker.client.post("/cost/events", body)
        assert (late.status, late.code) == (409, "lease_lost")
    assert [event["usage_key"] for event in await place.events(lease.task_id)] == ["search-1"]
    assert await place.tally(lease.task_id) == (0.25, 0, 13, 5, 1)


@pytest.mark.one_engine
async def test_only_the_holder_reports_on_a_lease(place: Place) -> None:
    lease = await running(place)
    other = await place.machine("other")
    named = {"task_id": lease.task_id, "lease_id": lease.lease_id}
    stranger = await other.client.post("/cost/events", {**ITEM, **named})
    assert (stranger.status, stranger.code) == (403, "forbidden")
    unknown = await place.worker.client.post("/cost/events", {**ITEM, **named, "lease_id": place.agent_id})
    assert (unknown.status, unknown.code) == (409, "lease_lost")
    without_task = await place.worker.client.post("/cost/events", {**ITEM, "lease_id": lease.lease_id})
    assert (without_task.status, without_task.json()["errors"][0]["pointer"]) == (422, "/task_id")
    negative = await place.worker.client.post("/cost/events", {**ITEM, **named, "cost_usd": -1})
    assert (negative.status, negative.json()["errors"][0]["pointer"]) == (422, "/cost_usd")
    assert (await place.worker.client.post("/cost/events", ITEM)).status == 403
    assert (await place.worker.client.get("/cost/events")).status == 403
    assert await place.events(lease.task_id) == []
