"""Contributed callables that raise, exit, return something else, or do not come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pluggy
import pytest
from tests.kernel.isolation.misbehaving import Gate, plugin, routes, until
from tests.limits import within

from corral.auth.principal import Principal
from corral.errors import ContributionFailed, Problem
from corral.events.consumers import Subscriber
from corral.plugin import Contributions, HealthCheck, Metric, hookimpl
from corral.plugins.guard import LOOP_SECONDS
from corral.testing.kit import Client, Kit, make_kernel

MakeKit = Callable[..., Awaitable[Kit]]


async def coroutine() -> None:
    """Never awaited."""


def errors(kit: Kit, name: str = "faulty") -> list[str]:
    return [f"{each.kind}: {each.message}" for each in kit.kernel.registry.errors(name)]


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda: "text", "TypeError: the call returned str, not NoneType"),
        (coroutine, "TypeError: the callable is a coroutine function, but must be a plain function"),
        (lambda: (_ for _ in ()).throw(SystemExit(4)), "SystemExit: 4"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
async def test_a_gate_that_errs_is_skipped(tmp_path: Path, act: Callable[[], Any], told: str) -> None:
    gates = [Gate(act), Gate()]
    faulty = plugin("faulty", corral_gates=lambda self: gates, corral_routes=lambda self: [routes("faulty")])
    async with make_kernel(tmp_path, plugins=[faulty]) as kit:
        assert (await kit.client.get("/faulty")).status == 200
        assert errors(kit) == [told]
        assert [gate.calls for gate in gates] == [1, 1]


@pytest.mark.parametrize("pause", ["loops", "sleeps"])
async def test_a_gate_that_does_not_come_back_stops_the_loop_for_a_moment(tmp_path: Path, pause: str) -> None:
    """The event loop is everybody's: there a call has a second, and a signal ends even its sleep."""

    hung: list[str] = []

    def hang() -> None:
        hung.append(pause)
        while True:
            if pause == "sleeps":
                time.sleep(600)

    async with make_kernel(tmp_path, plugins=[plugin("faulty", corral_gates=lambda self: [Gate(hang)])]) as kit:
        began = time.monotonic()
        for _ in range(2):
            assert (await kit.client.get("/health", root=True)).status == 200
        took = time.monotonic() - began
        assert 2 * LOOP_SECONDS <= took < 60
        await until(lambda: kit.loaded("faulty").state == "quarantined")  # at two lost calls
        assert "2 calls did not return" in (kit.loaded("faulty").reason or "")
        assert kit.kernel.database.watchdog.lost_threads()["faulty"] == 0
        assert (await kit.client.get("/health", root=True)).status == 200
        assert len(hung) == 2  # nobody calls it any more


async def test_many_short_calls_that_block_the_loop_together_are_nobodys_fault(tmp_path: Path) -> None:
    gate = Gate(lambda: time.sleep(0.05))
    async with make_kernel(tmp_path, plugins=[plugin("brief", corral_gates=lambda self: [gate])]) as kit:
        (guarded,) = kit.loaded("brief").contributions_to("corral_gates")
        for _ in range(40):  # without a step of the event loop in between
            guarded.check("127.0.0.1", "GET", "/")
        assert gate.calls == 40
        assert kit.kernel.registry.error_counts("brief") == (0, 0)


async def test_an_async_route_that_does_not_come_back_fails_alone(tmp_path: Path) -> None:
    group = routes("faulty")

    @group.get("/hangs", needs="public")
    async def hang() -> None:
        """Hang."""
        await asyncio.sleep(0)
        while True:
            pass

    async with make_kernel(tmp_path, plugins=[plugin("faulty", corral_routes=lambda self: [group])]) as kit:
        answer = await kit.client.get("/faulty/hangs")
        assert (answer.status, answer.code) == (500, "internal")
        assert (await kit.client.get("/faulty")).status == 200
        assert kit.loaded("faulty").active  # errors of routes never quarantine


async def test_health_checks_in_threads(tmp_path: Path) -> None:
    ended = threading.Event()

    def loop() -> tuple[str, str]:
        try:
            while True:
                time.sleep(0.001)  # leaves the processor to other tests
        finally:
            ended.set()

    def sleep() -> tuple[str, str]:
        time.sleep(60)
        return ("ok", "late")

    checks: dict[str, Callable[[], Any]] = {
        "fine": lambda: ("ok", "fine"),
        "wrong": lambda: True,
        "loop": loop,
        "sleep": sleep,
    }
    faulty = plugin(
        "faulty", corral_health_checks=lambda self: [HealthCheck(name, check) for name, check in checks.items()]
    )
    async with make_kernel(tmp_path, plugins=[faulty]) as kit:
        made = kit.kernel.container.get(Contributions).for_hook("corral_health_checks")
        by_name = {item.name: item.check for name, item in made if name == "faulty"}
        down = ("down", "The check of the plugin faulty failed.")
        assert await asyncio.to_thread(by_name["fine"]) == ("ok", "fine")
        assert await asyncio.to_thread(by_name["wrong"]) == down
        # one that loops is ended where it is, one that sleeps is left behind, and nobody waits for either
        told: object
        (told,) = await asyncio.gather(asyncio.to_thread(by_name["loop"]), return_exceptions=True)
        left = isinstance(told, ContributionFailed) and "did not return" in str(told)
        assert left or told == down  # the latter when it ends before it is left
        await until(ended.is_set)
        with pytest.raises(ContributionFailed, match="did not return"):
            await asyncio.to_thread(by_name["sleep"])
        assert kit.loaded("faulty").state == "quarantined"
        await until(lambda: kit.kernel.database.watchdog.lost_threads()["faulty"] == 1)
        text = (await kit.client.get("/metrics", root=True)).body.decode()
        assert 'corral_plugin_lost_threads{plugin="faulty"} 1' in text
        assert await asyncio.to_thread(lambda: "others go on") == "others go on"


@pytest.mark.one_engine
async def test_one_metric_that_errs_keeps_the_others(make_kit: MakeKit) -> None:
    def metrics(name: str, collect: Callable[[], Any]) -> Any:
        found = [Metric(name=f"corral_{name}", help="Of a test.", collect=collect)]
        return plugin(name, corral_metrics=lambda self: found)

    def leave() -> dict[tuple[str, ...], float]:
        raise SystemExit(2)

    odd = {"labelled": lambda: {("undeclared",): 7.0}, "worded": lambda: {(): "seven"}}
    given = {"exits": leave, "wrong": lambda: 7, "fine": lambda: {(): 7.0}, **odd}
    kit = await make_kit(plugins=[metrics(name, collect) for name, collect in given.items()])
    text = ""
    for _ in range(100):
        text = (await kit.client.get("/metrics", root=True)).body.decode()
        if "corral_fine 7.0" in text:
            break
        await asyncio.sleep(0.05)
    assert "corral_fine 7.0" in text
    assert "corral_exits " not in text
    assert errors(kit, "exits")[0] == "SystemExit: 2"
    assert errors(kit, "wrong")[0] == "TypeError: the call returned int, not Mapping"
    assert errors(kit, "labelled")[0].startswith("ValueError: zip()")
    assert errors(kit, "worded")[0] == "ValueError: could not convert string to float: 'seven'"


class Strange:
    """Recognises everything, and knows nobody."""

    def recognises(self, credential: str) -> bool:
        return True

    def authenticate(self, credential: str) -> Principal:
        raise KeyError(credential[:3])


@pytest.mark.one_engine
async def test_an_authenticator_that_errs_is_passed_over(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[plugin("faulty", corral_authenticators=lambda self: [Strange])])
    kit.kernel.credentials.set_authenticators([*reversed(kit.kernel.credentials._authenticators)])
    viewer = await kit.as_user("viewer")
    assert (await viewer.get("/auth/me")).status == 200
    assert errors(kit) == ["KeyError: 'eyJ'"]
    unknown = await Client(kit.application.app, "xyz_of_nobody_else").get("/auth/me")
    assert (unknown.status, unknown.code) == (503, "plugin_failed")  # it may be good: nobody should throw it away


async def test_a_subscriber_that_hangs_holds_up_nobody_for_long(make_kit: MakeKit) -> None:
    seen: list[str] = []

    def hang(event: Any) -> None:
        while True:
            time.sleep(0.001)  # leaves the processor to other tests

    kit = await make_kit(
        plugins=[
            plugin("faulty", corral_subscribers=lambda self: [Subscriber("faulty.f", ("user.created",), hang)]),
            plugin(
                "steady",
                corral_subscribers=lambda self: [
                    Subscriber("steady.f", ("user.created",), lambda event: seen.append(event.id))
                ],
            ),
        ],
        jobs=True,
    )
    await kit.as_user("viewer")
    async with within(25):
        await until(lambda: kit.loaded("faulty").state == "quarantined")
    await until(lambda: len(set(seen)) == 1)  # its unit may run again, with the lost one
    await kit.as_user("viewer")  # writes go on
    await until(lambda: len(set(seen)) == 2)


# -- hooks that plugins own

hookspec = pluggy.HookspecMarker("corral")


class Painter(Protocol):
    """Owned by the `art` plugin."""

    def ready(self) -> bool: ...
    async def paint(self, what: str) -> dict[str, str]: ...
    def strokes(self) -> AsyncIterator[str]: ...


ART = ModuleType("art")


def corral_painters() -> Iterable[Painter]:
    """Who paints."""
    raise AssertionError("only the declaration is read")


corral_painters.__annotations__["return"] = Iterable[Painter]
ART.corral_painters = hookspec(corral_painters)  # type: ignore[attr-defined]


class Careless:
    """Says of itself whatever a test wants."""

    name = "careless"

    def __init__(self, ready: Any = True, painting: Any = None) -> None:
        self.answers, self.painting = ready, painting

    def ready(self) -> bool:
        return self.answers  # type: ignore[no-any-return]

    async def paint(self, what: str) -> dict[str, str]:
        if isinstance(self.painting, BaseException):
            raise self.painting
        return self.painting or {"what": what}

    async def strokes(self) -> AsyncIterator[str]:
        yield "one"
        raise SystemExit(9)


async def test_hooks_of_plugins_are_guarded_by_what_their_protocol_says(tmp_path: Path) -> None:
    made = [Careless(), Careless("yes"), Careless(painting=SystemExit(1)), Careless(painting="a daub")]
    made.append(Careless(painting=Problem(code="quota_exceeded")))

    class Painting(plugin("painting")):  # type: ignore[misc]
        """Contributes to the hook of another."""

        wants = ("art",)

        @hookimpl(optionalhook=True)
        def corral_painters(self) -> Iterable[Painter]:
            return made

    art = plugin("art", corral_hookspecs=lambda self: [ART])
    async with make_kernel(tmp_path, plugins=[art, Painting]) as kit:
        found = [item for _, item in kit.kernel.container.get(Contributions).for_hook("corral_painters")]
        assert (found[0].name, isinstance(found[0], Careless), found[0].answers) == ("careless", True, True)
        assert (found[0].ready(), await found[0].paint("a cow")) == (True, {"what": "a cow"})
        with pytest.raises(TypeError, match="the call returned str, not bool"):
            found[1].ready()
        with pytest.raises(ContributionFailed, match="SystemExit"):
            await found[2].paint("a cow")
        with pytest.raises(TypeError, match="the call returned str, not dict"):
            await found[3].paint("a cow")
        with pytest.raises(Problem, match="quota_exceeded"):
            await found[4].paint("a cow")
        strokes = found[0].strokes()
        assert await anext(strokes) == "one"
        with pytest.raises(ContributionFailed):
            await anext(strokes)
        assert len(errors(kit, "painting")) == 4
        assert kit.kernel.container.get(Contributions).for_hook("corral_painters") != []
        with pytest.raises(TypeError):
            found[1].ready()  # the fifth error
        assert kit.kernel.container.get(Contributions).for_hook("corral_painters") == []
        with pytest.raises(ContributionFailed, match="painting is quarantined"):
            await found[0].paint("a cow")
