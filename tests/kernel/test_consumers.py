"""Durable consumers keep up with the log, also where nothing in it is for them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from corral.events import log as event_log
from corral.events.consumers import LAG, ConsumerRow, Subscriber
from corral.events.event import Event, emit
from corral.events.log import Record
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit, make_kernel

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


def _follow(event: Record) -> None:
    seen.append(json.loads(event.data)["number"])


async def _emit(kit: Kit, *events: Event) -> None:
    def unit() -> None:
        for event in events:
            emit(event, object=("patient", "1"))

    await kit.kernel.database.work(unit)


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
        async with asyncio.timeout(20):
            while (await _cursor(kit))[1] - (await _cursor(kit))[0] > LAG:  # noqa: ASYNC110  (nothing tells)
                await asyncio.sleep(0.05)
        for number in range(3):
            await _emit(kit, RareHeard(number=number), *[CommonHeard()] * LAG)
        async with asyncio.timeout(20):
            while len(seen) < 3:  # noqa: ASYNC110  (nothing tells)
                await asyncio.sleep(0.05)
        assert seen == [0, 1, 2]
