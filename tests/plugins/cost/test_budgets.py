"""The budget of the installation: its configuration, reservations, alerts and periods, without other plugins."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from corral import clock
from corral.ids import new_id
from corral_plugins.cost import jobs
from corral_plugins.cost.api import BudgetRefused, Hold, NewReservation, TokenCounts
from corral_plugins.cost.models import BudgetCounter, Reservation
from corral_plugins.cost.service.budget_limit_cache import BudgetLimitCache
from corral_plugins.cost.service.budget_maintenance import BudgetMaintenance

DEFAULTS = {
    "monthly_limit": None,
    "alert_thresholds": [50, 80, 100],
    "mode": "hard",
    "on_exceeded": "finish_running",
    "timezone": "UTC",
}


async def put(books: Any, **change: Any) -> Any:
    """Change the budget; the new budget."""
    answer = await books.admin.put("/cost/budget", change)
    assert answer.status == 200, answer
    return answer.json()


def wanted(usd: float, **more: Any) -> NewReservation:
    """A reservation of a call, or of the attempt that `more` describes."""
    given = {"holder": "call", "holder_id": new_id(), "expires_at": clock.now(60), **more}
    return NewReservation(amount_micro_usd=round(usd * 1e6), **given)


async def reserve(books: Any, usd: float, **more: Any) -> Hold | None:
    """Reserve an amount."""
    hold: Hold | None = await books.work(lambda: books.cost.reserve(wanted(usd, **more)))
    return hold


async def spend(books: Any, usd: str, hold: Hold | None = None, **more: Any) -> None:
    """Settle a use that cost this much."""
    await books.settle(usd, hold=hold, **more)


async def sent(books: Any, kind: str) -> list[Any]:
    """The payloads of the events of a type."""
    return [event.payload() for event in await books.kit.events() if event.type == kind]


async def counter(books: Any, scope: str = "global") -> tuple[int, int]:
    """What is spent and reserved according to the counter."""
    row = await books.work(lambda: BudgetCounter.get(BudgetCounter.scope == scope))
    return row.spent_micro, row.reserved_micro


@pytest.mark.one_engine
async def test_cost_2_a_budget_is_validated(books: Any) -> None:
    before = await books.read("budget")
    assert {name: before[name] for name in DEFAULTS} == DEFAULTS
    assert (before["remaining_usd"], before["percent"], before["status"]) == (None, None, "ok")
    for body, pointer in (
        ({"monthly_limit": -1}, "/monthly_limit"),
        ({"alert_thresholds": [80, 50]}, "/alert_thresholds"),
        ({"alert_thresholds": [50, 50]}, "/alert_thresholds"),
        ({"alert_thresholds": [0]}, "/alert_thresholds/0"),
        ({"alert_thresholds": [201]}, "/alert_thresholds/0"),
        ({"mode": "strict"}, "/mode"),
        ({"timezone": "Mars/Base"}, "/timezone"),
    ):
        refused = await books.admin.put("/cost/budget", body)
        assert (refused.status, refused.json()["errors"][0]["pointer"]) == (422, pointer), body
    assert (await books.member.put("/cost/budget", {"monthly_limit": 1})).status == 403
    changed = await put(books, monthly_limit=12.5, timezone="Asia/Kathmandu")
    assert (changed["monthly_limit"], changed["remaining_usd"], changed["percent"]) == (12.5, 12.5, 0)
    assert changed["period_start"].endswith("T18:15:00.000Z")
    assert (await put(books))["version"] == changed["version"] == before["version"] + 1
    stale = await books.admin.put("/cost/budget", {"monthly_limit": 1}, headers=[("if-match", '"1"')])
    assert stale.status == 412
    assert (await put(books, monthly_limit=None))["remaining_usd"] is None


@pytest.mark.one_engine
async def test_each_change_of_the_budget_is_published_once(books: Any) -> None:
    for limit, number in ((5, 1), (6, 2), (None, 3), (7, 4)):
        await put(books, monthly_limit=limit)
        assert len(await sent(books, "budget.changed")) == number


async def test_parallel_reservations_never_pass_the_limit(books: Any) -> None:
    await spend(books, "0.25")  # before the budget was set; it counts all the same
    await put(books, monthly_limit=1)

    outcomes = await asyncio.gather(*[reserve(books, 0.2) for _ in range(12)], return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, BudgetRefused)]
    assert {(each.code, each.scope) for each in refused} == {("budget_exceeded", "global")}
    holds = [each for each in outcomes if isinstance(each, Hold)]
    assert (len(holds), len(refused)) == (3, 9)
    assert await counter(books) == (250_000, 600_000)
    budget = await books.read("budget")
    assert (budget["spent_usd"], budget["reserved_usd"], budget["remaining_usd"]) == (0.25, 0.6, 0.15)
    listed = (await books.admin.get("/cost/reservations")).json()["items"]
    assert {item["holder_id"] for item in listed} == {hold.holder_id for hold in holds}
    await spend(books, "0.3", holds[0])  # more than was reserved is recorded in full
    await books.work(lambda: books.cost.release(holds[1]))
    await spend(books, "0.000001", holds[2])
    assert await counter(books) == (550_001, 0)
    assert (await books.read("budget"))["spent_usd"] == (await books.read("summary"))["month_usd"] == 0.550001
    assert (await books.admin.get("/cost/reservations")).json()["items"] == []


@pytest.mark.one_engine
async def test_calls_draw_on_the_reservation_of_their_attempt(books: Any) -> None:
    await put(books, monthly_limit=1)
    attempt = {"holder": "attempt", "holder_id": new_id(), "lease_id": new_id(), "task_id": new_id()}
    await reserve(books, 0.5, **attempt)
    draw = [wanted(usd, **attempt) for usd in (0.3, 0.2, 0.4, 0.2)]
    first = await books.work(lambda: books.cost.draw(draw[0]))
    await books.work(lambda: books.cost.draw(draw[1]))
    assert await counter(books) == (0, 500_000)
    await books.work(lambda: books.cost.draw(draw[2]))  # reserves what the reservation lacks
    assert await counter(books) == (0, 900_000)
    with pytest.raises(BudgetRefused, match="installation"):
        await books.work(lambda: books.cost.draw(draw[3]))
    await spend(books, "0.1", first, attempt_id=attempt["holder_id"], by_gateway=True)
    assert await counter(books) == (100_000, 800_000)
    await spend(books, "0.05", attempt_id=attempt["holder_id"])  # what a worker reports counts as used
    assert await counter(books) == (150_000, 750_000)
    await books.work(lambda: books.cost.release_attempt(attempt["holder_id"], is_capped=False))
    assert await counter(books) == (150_000, 0)


@pytest.mark.one_engine
async def test_the_cap_of_a_task_limits_its_attempt_without_any_budget(books: Any) -> None:
    capped = {"holder": "attempt", "holder_id": new_id(), "attempt_limit_micro_usd": 10_000}
    await reserve(books, 0.01, **capped)
    hold = await books.work(lambda: books.cost.draw(wanted(0.004, **capped)))
    with pytest.raises(BudgetRefused) as refused:
        await books.work(lambda: books.cost.draw(wanted(0.007, **capped)))
    assert refused.value.scope == "task"
    await spend(books, "0.001", hold)
    await books.work(lambda: books.cost.draw(wanted(0.009, **capped)))
    await books.work(lambda: books.cost.release_attempt(capped["holder_id"], is_capped=True))
    assert await books.work(lambda: Reservation.select().count()) == 0


async def test_cost_5_each_threshold_is_reported_once_until_the_limit_is_raised(books: Any) -> None:
    await put(books, monthly_limit=1)
    await asyncio.gather(*[spend(books, "0.0172") for _ in range(50)])
    crossed = await sent(books, "budget.threshold")
    assert [alert["threshold"] for alert in crossed] == [50, 80]
    assert all(alert["scope"] == "global" and alert["limit_usd"] == 1 for alert in crossed)
    budget = await books.read("budget")
    assert (budget["status"], budget["percent"]) == ("warning", 86)
    assert sorted(alert["threshold"] for alert in budget["alerts_sent"]) == [50, 80]
    await put(books, monthly_limit=1.6)  # 53 %: only the thresholds above it are armed again
    assert [alert["threshold"] for alert in (await books.read("budget"))["alerts_sent"]] == [50]
    await asyncio.gather(*[spend(books, "0.02") for _ in range(50)])
    thresholds = [alert["threshold"] for alert in await sent(books, "budget.threshold")]
    assert Counter(thresholds) == {50: 1, 80: 2, 100: 1}
    (exceeded,) = await sent(books, "budget.exceeded")
    assert (exceeded["scope"], exceeded["limit_usd"]) == ("global", 1.6)
    await put(books, monthly_limit=10)
    await spend(books, "8")
    assert len(await sent(books, "budget.threshold")) == 6
    assert (await books.read("budget"))["status"] == "warning"


async def test_a_soft_budget_warns_and_refuses_nothing(books: Any) -> None:
    await put(books, monthly_limit=0.1, mode="soft")
    hold = await reserve(books, 5)
    await spend(books, "5", hold)
    assert len(await sent(books, "budget.exceeded")) == 1
    await put(books, mode="off")
    assert await reserve(books, 5) is None
    await put(books, mode="hard")
    with pytest.raises(BudgetRefused):
        await reserve(books, 0.000001)


async def test_unpriced_uses_pass_while_anything_is_left(books: Any) -> None:
    unpriced = books.cost.quote("acme", "one", TokenCounts(input_tokens=10))
    assert not unpriced.priced

    async def reserve_unpriced() -> Any:
        return await books.work(lambda: books.cost.reserve(wanted(books.cost.amount_to_reserve(unpriced) / 1e6)))

    assert await reserve_unpriced() is None
    await put(books, monthly_limit=0.5)
    hold = await reserve_unpriced()
    await spend(books, None, hold)  # type: ignore[arg-type]
    assert await counter(books) == (0, 0)
    await spend(books, "0.5")
    with pytest.raises(BudgetRefused):
        await reserve_unpriced()


async def test_a_new_month_begins_with_nothing_spent(books: Any) -> None:
    await put(books, monthly_limit=1)
    kept = await reserve(books, 0.5)
    await spend(books, "0.9")
    ends = clock.parse_instant((await books.read("budget"))["period_end"])
    clock.travel(ends - clock.time_s() + 1)
    await books.pass_days(0)
    await books.kit.run_schedule("cost.period")
    budget = await books.read("budget")
    assert (budget["spent_usd"], budget["reserved_usd"], budget["status"]) == (0, 0.5, "ok")
    rows = await books.work(lambda: list(BudgetCounter.select().order_by(BudgetCounter.period).dicts()))
    assert [(row["spent_micro"], row["reserved_micro"]) for row in rows] == [(900_000, 500_000), (0, 500_000)]
    assert len(await sent(books, "budget.changed")) >= 2
    await spend(books, "0.2", kept)
    assert (await books.read("budget"))["spent_usd"] == 0.2


@pytest.mark.one_engine
async def test_reservations_without_a_sign_of_life_are_released(books: Any) -> None:
    await put(books, monthly_limit=1)
    await reserve(books, 0.5)
    await reserve(books, 0.2, expires_at=clock.now(600))
    clock.travel(65)
    await books.kit.run_schedule("cost.reap")
    assert await counter(books) == (0, 200_000)


async def test_a_counter_that_differs_is_corrected_and_reported(books: Any) -> None:
    await put(books, monthly_limit=5)
    await spend(books, "0.5")
    await reserve(books, 0.25)
    upkeep = books.kit.kernel.container.get(BudgetMaintenance)
    await jobs.reconcile_budgets(books.kit.kernel.database.work, upkeep)
    assert await sent(books, "system.alert") == []
    await books.work(lambda: BudgetCounter.update(spent_micro=1, reserved_micro=7).execute())
    await jobs.reconcile_budgets(books.kit.kernel.database.work, upkeep)
    assert await counter(books) == (500_000, 250_000)
    (alert,) = await sent(books, "system.alert")
    assert alert["kind"] == "cost_mismatch"


async def test_outdated_limits_create_no_counter(books: Any) -> None:
    cache = books.kit.service(BudgetLimitCache)
    await put(books, monthly_limit=10)
    outdated = cache.cached
    await put(books, monthly_limit=None)
    await spend(books, "1")
    cache.cached = outdated  # as in a process that has not read the limits again
    assert await reserve(books, 2) is None
    assert await books.work(lambda: BudgetCounter.select().count()) == 0
    await put(books, monthly_limit=10)
    assert await counter(books) == (1_000_000, 0)
    outdated = cache.cached
    await put(books, monthly_limit=20)
    await books.pass_days(31)
    cache.cached = outdated
    assert await reserve(books, 15) is not None
    row = await books.work(lambda: BudgetCounter.get(BudgetCounter.reserved_micro > 0))
    assert (row.limit_micro, row.reserved_micro) == (20_000_000, 15_000_000)
