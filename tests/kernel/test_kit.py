"""The test kit runs on request what the server runs by itself: services, units, schedules and subscribers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import click
import pytest

from corral.database.unit import in_unit
from corral.events.consumers import Subscriber
from corral.events.event import Event, emit
from corral.events.log import LoggedEvent
from corral.jobs.job import Schedule, ScheduleRow, TimeOfDay
from corral.plugin import OpenSession, Plugin, Provide, hookimpl
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
        return [Schedule("counter.tick", 3600, tick), Schedule("counter.daily", TimeOfDay("07:30", "UTC"), tick)]


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


async def test_with_jobs_the_due_times_are_set_at_once(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[CounterPlugin], jobs=True)
    stored = await kit.work(lambda: {row.name for row in ScheduleRow.select()}, read=True)
    assert {"counter.daily", "counter.tick"} <= stored


@click.command("count")
@click.argument("number", type=int)
@click.pass_obj
def count_command(open_session: OpenSession, number: int) -> None:
    """Count."""
    if number < 0:
        raise click.ClickException("the number is negative")
    with open_session(None, "count") as session:
        click.echo(session.run(lambda: session.service(Counter).count(number)))


async def test_a_test_runs_a_command_of_a_plugin(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[CounterPlugin])
    done = await kit.run_command(count_command, "7")
    assert (done.exit_code, done.stdout) == (0, "True\n")
    assert [event.type for event in await kit.events()] == ["counter.counted"]
    refused = await kit.run_command(count_command, "--", "-7")
    assert (refused.exit_code, refused.stderr) == (1, "Error: the number is negative\n")


@pytest.mark.one_engine
async def test_a_plugin_class_of_a_script_is_refused_with_the_remedy(make_kit: MakeKit) -> None:
    kind = type("ScriptPlugin", (CounterPlugin,), {"__module__": "__main__"})
    with pytest.raises(
        ValueError, match="ScriptPlugin is defined in the script that is being run; move it to a module"
    ):
        await make_kit(plugins=[kind])
