"""Sums are held against their events, old ones go, and metrics tell the totals."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from corral import clock
from corral.events.log import Record
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.cost import jobs
from corral_plugins.cost.models import Sum
from corral_plugins.cost.service import outcomes, reconcile, sums, upkeep


async def snapshot(books: Any) -> list[tuple[Any, ...]]:
    """Every sum, over all shards, without what is zero."""

    def read() -> Any:
        rows = Sum.select(Sum.series, Sum.period, Sum.key, Sum.part, *sums.SUMMED)
        return list(rows.group_by(Sum.series, Sum.period, Sum.key, Sum.part).tuples())

    rows = [tuple(map(int_of, row)) for row in await books.work(read)]
    return sorted(row for row in rows if any(row[4:]))


def int_of(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


async def alerts(books: Any) -> list[Any]:
    return [event.payload() for event in await books.kit.events() if event.type == "system.alert"]


async def spend(books: Any) -> None:
    for n in range(4):
        await books.settle(
            "1" if n else None,
            agent_id=new_id() if n % 2 else None,
            task_id=new_id() if n > 1 else None,
            user_id=books.member.user["id"],
            input_tokens=5,
            output_tokens=n,
        )
    await books.settle("-0.5")


async def test_right_sums_stay_as_they_are(books: Any) -> None:
    await spend(books)
    before = await snapshot(books)
    await jobs.check(books.kit.kernel.database.work)
    assert await snapshot(books) == before
    assert await alerts(books) == []


@pytest.mark.parametrize("kind", reconcile.KINDS)
async def test_wrong_sums_are_corrected_and_told(books: Any, kind: str) -> None:
    await spend(books)
    right = await snapshot(books)

    def spoil() -> None:
        some = Sum.series.startswith("quarter:") if kind == reconcile.QUARTERS else Sum.series == kind
        Sum.update(cost_micro=Sum.cost_micro + 7, calls=Sum.calls - 1).where(some).execute()
        all_time = {sums.MODEL: sums.TOTAL, sums.TASK: sums.TASK_TOTAL}.get(kind)
        if all_time is not None:
            Sum.update(cost_micro=Sum.cost_micro + 7, calls=Sum.calls - 1).where(Sum.series == all_time).execute()

    await books.work(spoil)
    assert await snapshot(books) != right
    await jobs.check(books.kit.kernel.database.work)
    assert await snapshot(books) == right
    (alert,) = await alerts(books)
    assert (alert["kind"], alert["severity"]) == ("cost_mismatch", "warning")


async def test_lost_sums_are_made_again(books: Any) -> None:
    await spend(books)
    right = await snapshot(books)
    by_day = Sum.series.in_(sums.BY_DAY) | Sum.series.startswith("quarter:")
    await books.work(lambda: Sum.delete().where(by_day).execute())
    await books.work(lambda: Sum.delete().where(Sum.series.in_((sums.TOTAL, sums.TASK_TOTAL))).execute())
    await jobs.check(books.kit.kernel.database.work)
    tasks = 4 + sums.FIGURES.index("tasks")  # which day a task began to cost is not in the events of a day

    def shown(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [row[:tasks] + row[tasks + 1 :] for row in rows if row[0] != sums.PRIVATE]

    assert shown(await snapshot(books)) == shown(right)


async def test_fine_sums_go_when_nobody_can_ask_for_them(books: Any) -> None:
    await spend(books)
    await books.pass_days(300)
    await spend(books)
    settings = books.kit.kernel.container.get(Settings)
    work = books.kit.kernel.database.work
    before = await snapshot(books)
    await jobs.prune(work, settings)
    assert await snapshot(books) == before
    await books.pass_days(150)
    await jobs.prune(work, settings)
    kept = await snapshot(books)
    gone = [row for row in before if row not in kept]
    assert gone
    assert {row[0].partition(":")[0] for row in gone} == {"quarter", sums.TASK}
    assert (await books.read("summary"))["total_usd"] == 5
    assert sum(item["cost_usd"] for item in (await books.read("daily?days=365"))["items"]) == 2.5


async def test_a_failure_after_the_old_events_went_takes_nothing_back(books: Any) -> None:
    task = new_id()

    async def fail(cost: str) -> float:
        await books.settle(cost, task_id=task)
        told = {"task_id": task, "agent_id": None}
        event = Record(
            1,
            new_id(),
            "task.failed",
            clock.now(),
            "system",
            None,
            "task",
            task,
            None,
            "shared",
            msgspec.json.encode(told).decode(),
            "[]",
        )
        await books.work(lambda: outcomes.note(event))
        wasted: float = (await books.read("summary"))["wasted_usd"]
        return wasted

    assert await fail("1") == 1
    await books.pass_days(100)
    assert await books.work(lambda: upkeep.prune_events(clock.now(-50 * 86_400))) == 1
    assert await fail("0.25") == 1.25


async def test_metrics_tell_totals_by_provider(books: Any) -> None:
    await books.settle("0.25", provider="acme")
    await books.settle(provider="acme", input_tokens=7)
    text = (await books.kit.client.get("/metrics")).body.decode()
    assert 'corral_cost_usd_total{provider="acme"} 0.25' in text
    assert 'corral_cost_unpriced_tokens_total{provider="acme"} 7.0' in text
