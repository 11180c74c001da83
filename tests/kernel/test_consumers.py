"""Durable consumers keep up with the log, also where nothing in it is for them."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corral import clock
from corral.database.leases import acquire_lease
from corral.events import log as event_log
from corral.events.consumers import LAG, LEASE_SECONDS, POLL_SECONDS, ConsumerRow, Subscriber
from corral.events.event import Event, EventTypes, emit
from corral.events.log import EventRow, LoggedEvent
from corral.plugin import Contributions, Plugin, hookimpl
from corral.testing.kit import Kit, make_kernel
from corral_core.event_log.jobs import prune_events

TAKE_OVER_SECONDS = 10

seen: list[int] = []


class RareHeard(Event, kw_only=True):
    """What is waited for."""

    event = "patient.rare"
    visibility = "admin"
    number: int


class CommonHeard(Event, kw_only=True):
    """What the log is full of."""

    event = "patient.common"
    visibility = "admin"


class PatientPlugin(Plugin):
    """Waits for rare events."""

    name = "patient"

    @hookimpl
    def corral_events(self) -> list[type[Event]]:
        return [RareHeard, CommonHeard]

    @hookimpl
    def corral_subscribers(self) -> list[Subscriber]:
        return [Subscriber("patient.follow", ("patient.rare",), _follow)]


def _follow(event: LoggedEvent) -> None:
    seen.append(json.loads(event.data)["number"])


async def _emit(kit: Kit, *events: Event) -> None:
    for at in range(0, len(events), 50):  # a unit of all of them may take longer than a unit may on a busy machine
        await kit.kernel.database.work(functools.partial(_emit_together, events[at : at + 50]))


def _emit_together(events: Sequence[Event]) -> None:
    for event in events:
        emit(event, object=("patient", "1"))


async def _cursor(kit: Kit) -> tuple[int, int]:
    def unit() -> tuple[int, int]:
        row = ConsumerRow.get_or_none(ConsumerRow.name == "patient.follow")
        return (-1 if row is None else row.cursor, event_log.last_seq())

    return await kit.kernel.database.work(unit, read=True)


async def test_a_consumer_of_rare_events_does_not_stay_behind_the_log(tmp_path: Path, database_url: str) -> None:
    seen.clear()
    async with make_kernel(tmp_path, plugins=[PatientPlugin], database_url=database_url, jobs=True) as kit:
        for _ in range(3):
            await _emit(kit, *[CommonHeard()] * LAG)
        async with asyncio.timeout(60):
            while (await _cursor(kit))[1] - (await _cursor(kit))[0] > LAG:  # noqa: ASYNC110  (nothing tells)
                await asyncio.sleep(0.05)
        for number in range(3):
            await _emit(kit, RareHeard(number=number), *[CommonHeard()] * LAG)
        async with asyncio.timeout(60):
            while len(seen) < 3:  # noqa: ASYNC110  (nothing tells)
                await asyncio.sleep(0.05)
        assert seen == [0, 1, 2]


class Keeping:
    """Settings: how many events are kept."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows

    def get(self, setting: Any) -> Any:
        return self.max_rows if setting.name == "events.max_rows" else 30


DAY = 86_400.0


async def _past(kit: Kit, age_days: float, *kinds: str) -> None:
    """Events of some days ago."""

    def unit() -> None:
        last = event_log.last_seq()
        for seq, kind in enumerate(kinds, last + 1):
            EventRow.insert(
                seq=seq,
                id=f"01900000-0000-7000-8000-{seq:012d}",
                type=kind,
                ts=clock.now(-age_days * DAY),
                actor_type="system",
                object_type="patient",
                object_id="1",
                visibility="admin",
                data="{}",
            ).execute()

    await kit.kernel.database.work(unit)


async def _prune(kit: Kit, max_rows: int) -> int:
    """How many events are left, but for alerts."""
    container, work = kit.kernel.container, kit.kernel.database.work
    offered = container.get(Contributions), container.get(EventTypes)
    await prune_events(work, Keeping(max_rows), *offered)
    await kit.events()  # until they are numbered
    kept = EventRow.select().where(EventRow.type != "system.alert")
    return await work(kept.count, read=True)


async def _alerts(kit: Kit) -> list[tuple[str, str]]:
    told = [json.loads(each.data) for each in await kit.events() if each.type == "system.alert"]
    return [(each["kind"], each["object"]["id"]) for each in told]


async def _stand(kit: Kit, name: str, cursor: int) -> None:
    place = {"name": name, "cursor": cursor, "updated_at": clock.now()}
    await kit.kernel.database.work(lambda: ConsumerRow.insert(**place).execute())


async def test_a_consumer_that_nobody_runs_holds_the_log_for_a_week(tmp_path: Path, database_url: str) -> None:
    async with make_kernel(tmp_path, plugins=[PatientPlugin], database_url=database_url) as kit:
        await _past(kit, 6, *["patient.common"] * 40)
        await _stand(kit, "gone.follow", 10)
        assert await _prune(kit, 5) == 30  # what it has yet to pass is kept
        assert await _alerts(kit) == []
        clock.travel(2 * DAY)
        assert await _prune(kit, 5) <= 5  # both bounds hold again
        assert await _alerts(kit) == [("consumer_behind", "gone.follow")]
        await _past(kit, 0, *["patient.common"] * 3)
        assert await _prune(kit, 5) <= 5  # also where nothing that is kept is old
        assert await _alerts(kit) == [("consumer_behind", "gone.follow")]  # once an hour
        clock.travel(3700)
        assert await _prune(kit, 5) <= 5
        assert await _alerts(kit) == [("consumer_behind", "gone.follow")] * 2


async def test_a_consumer_for_which_nothing_came_is_not_behind(tmp_path: Path, database_url: str) -> None:
    async with make_kernel(tmp_path, plugins=[PatientPlugin], database_url=database_url) as kit:
        await _past(kit, 20, *["patient.common"] * 40)
        await _stand(kit, "patient.follow", 10)
        assert await _prune(kit, 5) == 30
        await _past(kit, 8, "patient.rare", *["patient.common"] * 10)
        assert await _alerts(kit) == []
        assert await _prune(kit, 5) <= 5
        assert await _alerts(kit) == [("consumer_behind", "patient.follow")]


async def test_another_process_takes_over_soon_after_a_kill(tmp_path: Path) -> None:
    """A killed process does not release its lease, so the lease must end by itself."""
    assert LEASE_SECONDS + POLL_SECONDS <= TAKE_OVER_SECONDS
    async with make_kernel(tmp_path, plugins=[PatientPlugin]) as kit:
        lease = f"consumer:{kit.kernel.consumers[0].name}"
        await kit.kernel.database.work(lambda: acquire_lease(lease, "killed", LEASE_SECONDS))
        seen.clear()
        await kit.work(kit.kernel.consumers[0].create_cursor)
        await _emit(kit, RareHeard(number=7))
        await kit.events()
        await kit.kernel.consumers[0]._handle_next_batch()
        assert seen == []
        clock.travel(TAKE_OVER_SECONDS - POLL_SECONDS)
        await kit.kernel.consumers[0]._handle_next_batch()
        assert seen == [7]
