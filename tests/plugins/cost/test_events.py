"""Cost events: recorded once, visible to the right users, and kept for the configured time."""

from __future__ import annotations

from typing import Any

import pytest

from corral import clock
from corral.database.unit import current
from corral.errors import Invalid
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.cost import jobs
from corral_plugins.cost.api import MAX_TOKENS, BillableUsage
from corral_plugins.cost.models import CostEvent
from corral_plugins.cost.settings import EVENT_RETENTION_DAYS

NEW = {"usage_key": "invoice-7", "provider": "acme", "model": "one", "input_tokens": 10, "cost_usd": 0.25}


async def test_the_first_event_of_a_key_stays(books: Any) -> None:
    first = await books.settle("0.5", usage_key="same", input_tokens=7)
    again = await books.settle("99", usage_key="same", input_tokens=70)
    assert (first.repeated, again.repeated) == (False, True)
    assert (again.event_id, again.cost_micro_usd, again.price_source) == (first.event_id, 500_000, "reported")
    assert (await books.read("summary"))["total_usd"] == 0.5


async def test_many_events_of_one_unit_are_summed(books: Any) -> None:
    def unit() -> None:
        for n in range(3):
            books.cost.record_cost(
                BillableUsage(usage_key=f"in-one-{n % 2}", provider="local", model="m", input_tokens=5)
            )

    await books.work(unit)
    summary = await books.read("summary")
    assert summary["tokens"]["input"] == 10
    assert (await books.read("events"))["total"] == 2


async def test_what_a_part_of_a_unit_undoes_is_not_summed(books: Any) -> None:
    def unit() -> None:
        running = current()
        books.cost.record_cost(BillableUsage(usage_key="kept", provider="local", model="m", input_tokens=5))
        length = len(running.before)
        running.connection.execute("SAVEPOINT part")
        books.cost.record_cost(BillableUsage(usage_key="undone", provider="local", model="m", input_tokens=50))
        running.connection.execute("ROLLBACK TO SAVEPOINT part")
        del running.before[length:]

    await books.work(unit)
    assert (await books.read("summary"))["tokens"]["input"] == 5
    assert [item["usage_key"] for item in (await books.read("events"))["items"]] == ["kept"]


@pytest.mark.one_engine
@pytest.mark.parametrize("count", [-1, MAX_TOKENS + 1])
async def test_absurd_counts_are_refused(books: Any, count: int) -> None:
    for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens"):
        with pytest.raises(Invalid) as refused:
            await books.settle(**{name: count})
        assert refused.value.errors[0].pointer == f"/{name}"
        answer = await books.admin.post("/cost/events", {**NEW, name: count})
        assert (answer.status, answer.json()["errors"][0]["pointer"]) == (422, f"/{name}")
    with pytest.raises(Invalid):
        await books.settle(usage_key="x" * 201)
    assert (await books.read("events"))["total"] == 0


@pytest.mark.one_engine
async def test_admins_write_and_correct(books: Any) -> None:
    created = await books.admin.post("/cost/events", {**NEW, "note": "an invoice", "operation": "tool"})
    assert created.status == 201, created
    event = created.json()
    assert (event["cost_usd"], event["price_source"], event["priced"]) == (0.25, "reported", True)
    assert created.headers["location"] == f"/api/v1/cost/events/{event['id']}"
    assert (await books.read(f"events/{event['id']}", by=books.admin)) == event
    again = await books.admin.post("/cost/events", {**NEW, "cost_usd": 5})
    assert (again.status, again.json()) == (200, event)
    correction = await books.admin.post(
        "/cost/events", {"usage_key": "credit-7", "provider": "acme", "model": "one", "cost_usd": -0.05}
    )
    assert (correction.status, correction.json()["cost_usd"]) == (201, -0.05)
    (row,) = (await books.read("by-provider"))["items"]
    assert (row["cost_usd"], row["calls"]) == (0.2, 1)  # a correction is no call


@pytest.mark.one_engine
async def test_only_admins_write_without_a_lease(books: Any) -> None:
    for role in ("member", "viewer", "auditor"):
        caller = await books.kit.as_user(role)
        assert (await caller.post("/cost/events", NEW)).status == 403
    assert (await books.admin.post("/cost/events", {**NEW, "cost_usd": 2_000_000})).status == 422
    assert (await books.admin.post("/cost/events", {**NEW, "ts": clock.now()})).status == 422


async def test_users_see_shared_events_and_their_own(books: Any) -> None:
    mine, other = books.member.user["id"], (await books.kit.as_user("member")).user["id"]
    ids = {
        "task": await books.settle("1", task_id=new_id(), user_id=other),
        "run": await books.settle("1", run_id=new_id(), user_id=other),
        "agent": await books.settle("1", agent_id=new_id(), user_id=other),
        "nobody": await books.settle("1"),
        "mine": await books.settle("1", user_id=mine),
        "chat": await books.settle("1", user_id=other, agent_id=new_id(), conversation_id=new_id()),
        "direct": await books.settle("1", user_id=other),
    }
    names = {charged.event_id: name for name, charged in ids.items()}
    hidden = {"chat", "direct"}

    def seen(page: Any) -> set[str]:
        assert page["total"] == len(page["items"])
        return {names[item["id"]] for item in page["items"]}

    assert seen(await books.read("events")) == set(ids) - hidden
    assert seen(await books.read("events", by=books.admin)) == set(ids)
    assert seen(await books.read("events?provider=acme")) == set(ids) - hidden
    assert seen(await books.read(f"events?user_id={other}")) == {"task", "run", "agent"}
    assert seen(await books.read(f"events?user_id={other.upper()}&model=one", by=books.admin)) == set(ids) - {
        "nobody",
        "mine",
    }
    assert (await books.member.get(f"/cost/events/{ids['chat'].event_id}")).status == 404
    assert (await books.member.get(f"/cost/events/{ids['mine'].event_id}")).status == 200
    assert (await books.read("summary"))["total_usd"] == 7  # totals are of everything
    auditor = await books.kit.as_user("auditor")
    assert (await auditor.get("/cost/events")).status == 403


async def test_lists_page_and_filter(books: Any) -> None:
    task = new_id()
    for n in range(5):
        clock.travel(1)
        await books.settle("1", task_id=task if n % 2 else None, model=f"m{n}")
    first = await books.read("events?limit=2")
    following = await books.read(f"events?limit=2&cursor={first['next']}")
    assert [item["model"] for item in first["items"] + following["items"]] == ["m4", "m3", "m2", "m1"]
    assert first["total"] == following["total"] == 5
    of_task = await books.read(f"events?task_id={task}")
    assert [item["model"] for item in of_task["items"]] == ["m3", "m1"]
    third = first["items"][1]["ts"]
    assert [item["model"] for item in (await books.read(f"events?since={third}"))["items"]] == ["m4", "m3"]
    assert [item["model"] for item in (await books.read(f"events?until={third}"))["items"]] == ["m2", "m1", "m0"]
    refused = await books.member.get("/cost/events?since=yesterday")
    assert (refused.status, refused.code) == (422, "validation_error")


@pytest.mark.one_engine
async def test_old_events_are_deleted_and_totals_remain(books: Any) -> None:
    person = books.member.user["id"]
    for _ in range(3):
        await books.settle("1", user_id=person)
    await books.pass_days(100)
    await books.settle("1")
    kept = await books.read("daily?days=120")
    settings: Any = books.kit.kernel.container.get(Settings)
    await jobs.delete_expired_events(books.kit.kernel.database.work, settings)
    assert (await books.read("events"))["total"] == 4  # for ever is the default

    class Pinned:
        def get(self, setting: Any) -> Any:
            return 90 if setting is EVENT_RETENTION_DAYS else settings.get(setting)

    await jobs.delete_expired_events(books.kit.kernel.database.work, Pinned())
    page = await books.read("events")
    assert (page["total"], len(page["items"])) == (1, 1)
    assert (await books.read("daily?days=120")) == kept
    assert (await books.read("summary"))["total_usd"] == 4
    assert await books.work(CostEvent.select().count) == 1
