"""Rollups are reconciled with their events, old data is deleted, and metrics show the totals."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from corral import clock
from corral.events.log import LoggedEvent
from corral.ids import new_id
from corral.plugin import Settings
from corral_plugins.cost import jobs
from corral_plugins.cost.models import Rollup
from corral_plugins.cost.service import maintenance, rollups


async def snapshot(books: Any) -> list[tuple[Any, ...]]:
    """Every rollup, added over all shards, without those that are zero."""

    def read() -> Any:
        rows = Rollup.select(Rollup.series, Rollup.period, Rollup.key, Rollup.subkey, *rollups.SUM_COLUMNS)
        return list(rows.group_by(Rollup.series, Rollup.period, Rollup.key, Rollup.subkey).tuples())

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


@pytest.mark.one_engine
async def test_correct_rollups_are_unchanged(books: Any) -> None:
    await spend(books)
    before = await snapshot(books)
    await jobs.reconcile_rollups(books.kit.kernel.database.work)
    assert await snapshot(books) == before
    assert await alerts(books) == []


@pytest.mark.parametrize("series", maintenance.RECONCILED_SERIES)
async def test_wrong_rollups_are_corrected_with_an_alert(books: Any, series: str) -> None:
    await spend(books)
    right = await snapshot(books)

    def spoil() -> None:
        wrong = Rollup.update(cost_micro=Rollup.cost_micro + 7, calls=Rollup.calls - 1)
        is_prefix = series == rollups.QUARTER_HOURLY
        wrong.where(Rollup.series.startswith(series) if is_prefix else Rollup.series == series).execute()
        longer = {
            rollups.AGENT: rollups.AGENT_MONTH,
            rollups.MODEL: rollups.TOTAL,
            rollups.TASK: rollups.TASK_TOTAL,
        }.get(series)
        if longer is not None:
            wrong.where(Rollup.series == longer).execute()

    await books.work(spoil)
    assert await snapshot(books) != right
    await jobs.reconcile_rollups(books.kit.kernel.database.work)
    assert await snapshot(books) == right
    (alert,) = await alerts(books)
    assert (alert["kind"], alert["severity"]) == ("cost_mismatch", "warning")


async def test_lost_rollups_are_restored(books: Any) -> None:
    await spend(books)
    right = await snapshot(books)
    by_day = Rollup.series.in_(rollups.DAILY_SERIES) | Rollup.series.startswith(rollups.QUARTER_HOURLY)
    await books.work(lambda: Rollup.delete().where(by_day).execute())
    longer = (rollups.AGENT_MONTH, rollups.TOTAL, rollups.TASK_TOTAL)
    await books.work(lambda: Rollup.delete().where(Rollup.series.in_(longer)).execute())
    await jobs.reconcile_rollups(books.kit.kernel.database.work)
    tasks = 4 + rollups.COUNTERS.index(
        "tasks"
    )  # the events of a day do not show on which day a task had its first cost

    def shown(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [row[:tasks] + row[tasks + 1 :] for row in rows if row[0] != rollups.PRIVATE]

    assert shown(await snapshot(books)) == shown(right)


async def test_detailed_rollups_are_deleted_when_no_report_reads_them(books: Any) -> None:
    await spend(books)
    await books.pass_days(300)
    await spend(books)
    settings = books.kit.kernel.container.get(Settings)
    work = books.kit.kernel.database.work
    before = await snapshot(books)
    await jobs.delete_expired_events(work, settings)
    assert await snapshot(books) == before
    await books.pass_days(150)
    await jobs.delete_expired_events(work, settings)
    kept = await snapshot(books)
    gone = [row for row in before if row not in kept]
    assert gone
    assert {row[0].partition(":")[0] for row in gone} == {"quarter_hour", rollups.TASK}
    assert (await books.read("summary"))["total_usd"] == 5
    assert sum(item["cost_usd"] for item in (await books.read("daily?days=365"))["items"]) == 2.5


async def test_wasted_cost_includes_deleted_events(books: Any) -> None:
    task = new_id()

    async def fail(cost: str) -> float:
        await books.settle(cost, task_id=task)
        told = {"task_id": task, "agent_id": None}
        event = LoggedEvent(
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
        await books.work(lambda: rollups.record_outcome_event(event))
        wasted: float = (await books.read("summary"))["wasted_usd"]
        return wasted

    assert await fail("1") == 1
    await books.pass_days(100)
    assert await books.work(lambda: maintenance.delete_events(clock.now(-50 * 86_400))) == 1
    assert await fail("0.25") == 1.25


@pytest.mark.one_engine
async def test_metrics_show_totals_by_provider(books: Any) -> None:
    await books.settle("0.25", provider="acme")
    await books.settle(provider="acme", input_tokens=7)
    text = (await books.kit.client.get("/metrics")).body.decode()
    assert 'corral_cost_usd{provider="acme"} 0.25' in text
    assert 'corral_cost_unpriced_tokens{provider="acme"} 7.0' in text
