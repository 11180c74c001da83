"""The time of reads does not grow with the number of events: promise 9."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.plugins.cost import seeds
from tests.plugins.cost.conftest import Books

READS = (
    "summary",
    "summary?tz=Europe/Berlin",
    "daily",
    "daily?days=365&tz=Asia/Kathmandu",
    "daily?days=365&provider=openai",
    "by-agent",
    "by-agent?days=365",
    "by-provider?days=365",
    "by-model?days=365",
    "budget",
    "by-workflow",
    "by-task",
    "by-task?days=365",
    "events",
    "events?provider=openai",
    "events?provider=openai&model=gpt-4o",
    "events?offset=10000",
    "prices",
    "prices/lookup?provider=openai&model=gpt-4o",
)


async def _check(books: Books, *, rounds: int, limit_seconds: float) -> None:
    """Every read of a member, who sees only some events, and the reads of the admin."""
    (some, *_) = (await books.read("by-agent?days=365"))["items"]
    for path in (*READS, f"daily?days=365&agent_id={some['agent_id']}", f"events?agent_id={some['agent_id']}"):
        await books.read(path)  # the first of a kind compiles its statement
        assert await _p95(books, path, rounds) <= limit_seconds, path
    daily, by_agent = await books.read("daily?days=365"), await books.read("by-agent?days=365")
    assert round(sum(item["cost_usd"] for item in daily["items"]), 6) == by_agent["total_usd"] > 0


async def _p95(books: Books, path: str, rounds: int) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        await books.read(path)
        took.append(time.perf_counter() - began)
    return sorted(took)[int(rounds * 0.95) - 1]


async def test_cost_9_reads_stay_fast_whatever_the_number_of_events(
    make_kit: Callable[..., Any], long_form: bool
) -> None:
    """`--long`: a million events on SQLite, each read within 200 ms."""
    books = await Books().build(await make_kit(plugins=["cost"]))
    is_sqlite = books.kit.kernel.database.kind == "sqlite"
    is_full = long_form and is_sqlite
    count = 1_000_000 if is_full else 12_000 if long_form or is_sqlite else 4_000
    await seeds.fill(books.kit, count, days=365 if is_full else 300)
    assert (await books.read("events", by=books.admin))["total"] == count
    await _check(books, rounds=40 if is_full else 3, limit_seconds=0.2 if is_full else 1)
