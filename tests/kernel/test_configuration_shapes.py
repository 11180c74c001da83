"""A plugin's functions receive its configuration by type, and no plugin receives that of another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import msgspec
import pytest

from corral.auth.principal import PUBLIC
from corral.events.consumers import Subscriber
from corral.events.event import Event, emit
from corral.events.log import LoggedEvent
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule, enqueue
from corral.plugin import Plugin, Provide, hookimpl
from corral.testing.kit import Kit

pytestmark = pytest.mark.one_engine
MakeKit = Callable[..., Awaitable[Kit]]


class TonesConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Configuration of the plugin of this test."""

    tone: str = "plain"


class Sounded(Event, kw_only=True):
    """A tone sounded."""

    event = "tones.sounded"


class Tones(Protocol):
    """What each function received."""

    heard: list[str]


class TonesService:
    """Implements `Tones`."""

    def __init__(self, config: TonesConfig) -> None:
        self.heard = [f"service {config.tone}"]


routes = Routes("/tones", tag="Tones")


@routes.get("/", needs=PUBLIC)
def read_tone(config: TonesConfig) -> dict[str, str]:
    """Read the tone."""
    return {"tone": config.tone}


@routes.get("/later", needs=PUBLIC)
async def read_later(config: TonesConfig) -> dict[str, str]:
    """Read the tone outside a unit."""
    return {"tone": config.tone}


def repeat(times: int, tones: Tones, config: TonesConfig) -> None:
    tones.heard.append(f"job {config.tone}" * times)


async def tick(tones: Tones, config: TonesConfig) -> None:
    tones.heard.append(f"schedule {config.tone}")


def follow(event: LoggedEvent, tones: Tones, config: TonesConfig) -> None:
    tones.heard.append(f"subscriber {config.tone}")


class TonesPlugin(Plugin):
    """Tones."""

    name = "tones"
    config = TonesConfig

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Tones, TonesService)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [Sounded]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [Job("tones.repeat", repeat)]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return [Schedule("tones.tick", 3600, tick)]

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [Subscriber("tones.follow", ("tones.sounded",), follow)]


async def test_each_function_receives_the_configuration(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[TonesPlugin], config={"plugins.tones": {"tone": "shrill"}})
    for path in ("/tones", "/tones/later"):
        assert (await kit.client.get(path)).json() == {"tone": "shrill"}
    await kit.work(lambda: [enqueue("tones.repeat", times=1), emit(Sounded(), object=("tone", "1"))])
    assert await kit.run_jobs() == 1
    await kit.run_schedule("tones.tick")
    await kit.run_consumers()
    assert kit.service(Tones).heard == ["service shrill", "job shrill", "schedule shrill", "subscriber shrill"]


async def test_without_a_section_it_has_its_defaults(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[TonesPlugin])
    assert (await kit.client.get("/tones")).json() == {"tone": "plain"}


def spying(**hooks: Callable[[Any], Any]) -> type[Plugin]:
    body = {name: hookimpl(function) for name, function in hooks.items()}
    return type("SpyPlugin", (Plugin,), {"__doc__": "Spy.", "name": "spy", "requires": ("tones",), **body})


def spy(config: TonesConfig) -> None: ...


def spying_routes() -> Routes:
    group = Routes("/spy", tag="Spy")

    @group.get("/", needs=PUBLIC)
    def read_spy(config: TonesConfig) -> dict[str, str]:
        """Read what belongs to another plugin."""
        return {"tone": config.tone}

    return group


@pytest.mark.parametrize(
    "hooks",
    [
        {"corral_jobs": lambda self: [Job("spy.go", spy)]},
        {"corral_schedules": lambda self: [Schedule("spy.go", 60, spy)]},
        {"corral_services": lambda self: [Provide(Tones, TonesService)]},
        {"corral_routes": lambda self: [spying_routes()]},
    ],
    ids=["job", "schedule", "service", "route"],
)
async def test_the_shape_of_another_plugin_is_refused_at_boot(hooks: Any, make_kit: MakeKit) -> None:
    """Also if the other plugin is required, whose services this one may use."""
    kit = await make_kit(plugins=[TonesPlugin, spying(**hooks)])
    found = kit.loaded("spy")
    assert (kit.loaded("tones").state, found.state) == ("active", "failed")
    assert "TonesConfig is the configuration of another plugin" in (found.reason or ""), found.reason
