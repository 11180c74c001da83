"""The test kit runs on request what the server runs by itself: services, units, schedules and subscribers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import pytest

from corral.database.unit import in_unit
from corral.events.consumers import Subscriber
from corral.events.event import Event, emit
from corral.events.log import LoggedEvent
from corral.jobs.job import Schedule
from corral.plugin import Plugin, Provide, hookimpl
from corral.testing.kit import Kit

MakeKit = Callable[..., Awaitable[Kit]]


class Counted(Event, kw_only=True):
    """A number was counted."""

    event = "counter.counted"
    number: int


class Counter(Protocol):
    """Counts."""

    seen: list[str]

    def count(self, number: int) -> bool: ...


class CounterService:
    """Implements `Counter`."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def count(self, number: int) -> bool:
        emit(Counted(number=number), object=("number", str(number)))
        return in_unit()


def follow(event: LoggedEvent, counter: Counter) -> None:
    counter.seen.append(event.type)


def tick(counter: Counter) -> None:
    counter.seen.append("tick")


class CounterPlugin(Plugin):
    """Counter."""

    name = "counter"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Counter, CounterService)]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [Counted]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("counter.follow", ("counter.counted",), follow)]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return [Schedule("counter.tick", 3600, tick)]


async def test_a_test_calls_services_schedules_and_consumers(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[CounterPlugin])
    counter = kit.service(Counter)
    assert await kit.work(lambda: counter.count(1))
    assert counter.seen == []
    await kit.run_consumers()
    await kit.run_consumers()
    assert counter.seen == ["counter.counted"]
    await kit.run_schedule("counter.tick")
    assert counter.seen == ["counter.counted", "tick"]
    with pytest.raises(LookupError, match=r"no active plugin has the schedule counter\.tock"):
        await kit.run_schedule("counter.tock")
