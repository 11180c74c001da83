"""A plugin in which too much goes wrong is held, tries again, and loses nothing. Others do not notice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.kernel.isolation.misbehaving import Gate, alerts, placed, plugin, routes, told, until

from corral import clock
from corral.errors import Forbidden
from corral.events.consumers import Subscriber
from corral.jobs.job import Job, JobRow, Schedule, enqueue
from corral.testing.kit import Client, Kit
from corral_core.plugin_admin.models import QuarantineRow
from corral_core.plugin_admin.service import quarantine

pytestmark = pytest.mark.one_engine

MakeKit = Callable[..., Awaitable[Kit]]


def fail() -> None:
    raise ValueError("it is broken")


def gated(name: str, act: Callable[[], Any]) -> tuple[Any, Gate]:
    gate = Gate(act)
    return plugin(name, corral_gates=lambda self: [gate], corral_routes=lambda self: [routes(name)]), gate


async def test_five_errors_hold_a_plugin_and_everybody_hears_of_it(make_kit: MakeKit) -> None:
    faulty, broken = gated("faulty", fail)
    steady, sound = gated("steady", lambda: None)
    kit = await make_kit(plugins=[faulty, steady])
    for number in range(8):
        assert (await kit.client.get("/steady")).status == 200
        assert kit.loaded("faulty").active is (number < 4)
    assert (broken.calls, sound.calls) == (5, 8)  # the others are all called, the held one no more
    loaded = kit.loaded("faulty")
    assert "5 errors in 60 s; the last one in corral_gates Gate.check: ValueError: it is broken" in (
        loaded.reason or ""
    )
    assert (await kit.client.get("/faulty")).json() == {"plugin": "faulty"}  # its routes go on
    admin = await kit.as_user("admin")
    seen = (await admin.get("/plugins/faulty")).json()
    assert (seen["state"], seen["errors_60s"], seen["last_error"]["kind"]) == ("quarantined", 5, "ValueError")
    assert len((await admin.get("/plugins/faulty/errors")).json()["items"]) == 5
    assert [each["name"] for each in (await admin.get("/plugins?state=quarantined")).json()["items"]] == ["faulty"]

    assert await alerts(kit) == [("plugin_quarantined", "faulty")]
    assert await told(kit, "faulty") == [("active", "quarantined")]
    text = (await kit.client.get("/metrics", root=True)).body.decode()
    assert 'corral_plugin_errors_total{plugin="faulty"} 5' in text
    assert 'corral_plugin_state{plugin="faulty",state="quarantined"} 1' in text
    assert 'corral_plugin_call_seconds_count{plugin="faulty",hook="corral_gates"} 5' in text


async def test_declared_failures_are_answers(make_kit: MakeKit) -> None:
    def refuse() -> None:
        raise Forbidden("not from here", code="ip_blocked")

    strict, gate = gated("strict", refuse)
    kit = await make_kit(plugins=[strict])
    for _ in range(7):
        assert (await kit.client.get("/auth/me")).code == "ip_blocked"
    assert (gate.calls, kit.loaded("strict").state, kit.kernel.registry.error_counts("strict")) == (7, "active", (0, 0))


async def test_errors_of_routes_never_hold_a_plugin(make_kit: MakeKit) -> None:
    group = routes("faulty")

    @group.get("/broken", needs="public")
    def broken() -> None:
        """Break."""
        raise SystemExit(3)

    @group.get("/async", needs="public")
    async def broken_too() -> None:
        """Break."""
        raise SystemExit(3)

    kit = await make_kit(plugins=[plugin("faulty", corral_routes=lambda self: [group])])
    for path in ("/faulty/broken", "/faulty/async") * 5:
        answer = await kit.client.get(path)
        assert (answer.status, answer.code, answer.json()["plugin"]) == (500, "internal", "faulty")
    assert (kit.loaded("faulty").state, kit.kernel.registry.error_counts("faulty")) == ("active", (10, 10))


async def test_what_is_held_is_held_and_nothing_of_it_is_lost(make_kit: MakeKit) -> None:
    seen: list[str] = []
    heal = asyncio.Event()

    def follow(event: Any) -> None:
        if not heal.is_set():
            fail()
        seen.append(event.id)

    faulty = plugin(
        "faulty",
        corral_subscribers=lambda self: [Subscriber("faulty.follow", ("user.created",), follow)],
        corral_jobs=lambda self: [Job("faulty.do", lambda: seen.append("job"))],
        corral_schedules=lambda self: [Schedule("faulty.tick", 0.1, lambda: seen.append("tick"))],
    )
    kit = await make_kit(plugins=[faulty], jobs=True)
    begun = await placed(kit, "faulty.follow")
    admin = await kit.as_user("admin")
    await kit.as_user("viewer")
    await until(lambda: kit.loaded("faulty").state == "quarantined")
    ticks = len(seen)
    # the first event has failed five times: it is set aside with an alert, as everywhere; the second one is not lost
    assert await placed(kit, "faulty.follow") >= begun
    await kit.kernel.database.work(lambda: enqueue("faulty.do"))
    await asyncio.sleep(1.5)  # longer than runner and consumers wait
    assert [each for each in seen[ticks:] if each != "tick"] == []
    assert len(seen) - ticks <= 1  # a slot that was taken already
    heal.set()
    assert (await admin.post("/plugins/faulty/enable", {})).json()["state"] == "active"
    await until(lambda: "job" in seen and any(len(each) > 10 for each in seen))
    for _ in range(100):  # its end is written after its work
        state = await kit.kernel.database.work(lambda: JobRow.get(JobRow.name == "faulty.do").state, read=True)
        if state != "running":
            break
        await asyncio.sleep(0.05)
    assert state == "done"
    assert await told(kit, "faulty") == [("active", "quarantined"), ("quarantined", "active")]


async def test_it_tries_again_and_waits_longer_each_time(make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "LOOK_SECONDS", 0.05)
    faulty, gate = gated("faulty", fail)
    kit = await make_kit(plugins=[faulty])

    async def row() -> QuarantineRow | None:
        return await kit.kernel.database.work(lambda: QuarantineRow.get_or_none(), read=True)

    async def ask_until(done: Callable[[QuarantineRow | None], bool]) -> None:
        for _ in range(400):
            await kit.client.get("/faulty")
            if done(await row()):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(await row())

    await ask_until(lambda found: found is not None and found.state == "held")
    clock.travel(40)  # and what the machine takes
    await asyncio.sleep(0.5)
    assert (kit.loaded("faulty").state, gate.calls) == ("quarantined", 5)
    clock.travel(22)
    await ask_until(lambda found: found is not None and (found.state, found.probes) == ("held", 1))
    assert gate.calls == 6  # the first error on probation held it
    clock.travel(100)
    await asyncio.sleep(0.5)
    assert (kit.loaded("faulty").state, gate.calls) == ("quarantined", 6)
    gate.act = lambda: None
    clock.travel(25)
    await ask_until(lambda found: gate.calls > 8)
    clock.travel(65)  # a window without an error: forgotten
    for _ in range(200):
        if await row() is None:
            break
        await asyncio.sleep(0.05)
    assert await row() is None
    assert await told(kit, "faulty") == [
        ("active", "quarantined"),
        ("quarantined", "active"),
        ("active", "quarantined"),
        ("quarantined", "active"),
        ("active", "active"),
    ]


async def test_another_process_follows(make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels on one database are two processes."""
    monkeypatch.setattr(
        "corral_core.health.service.single_machine_lock.SingleMachineLock.acquire", lambda self: asyncio.sleep(0)
    )
    (first, gate), (second, other) = gated("faulty", fail), gated("faulty", lambda: None)
    one, two = await make_kit(plugins=[first]), await make_kit(plugins=[second])
    for _ in range(5):
        await one.client.get("/faulty")
    await until(lambda: two.loaded("faulty").state == "quarantined", 5)
    calls = other.calls
    await two.client.get("/faulty")
    assert other.calls == calls
    gate.act = lambda: None
    admin = await two.as_user("admin")
    assert (await admin.post("/plugins/faulty/enable", {})).status == 200
    await until(lambda: one.loaded("faulty").active, 5)


async def test_a_protected_plugin_alerts_and_goes_on(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[])
    core = kit.loaded("accounts")

    async def told_of(count: int) -> None:
        for _ in range(count):
            kit.kernel.quarantine.count_error(core, "a test", ValueError("it is broken"))
        assert core.active
        await until(lambda: not kit.kernel.quarantine.alerts)
        await asyncio.sleep(0.2)

    await told_of(17)
    assert await alerts(kit) == [("plugin_errors", "accounts")]
    await told_of(5)
    assert await alerts(kit) == [("plugin_errors", "accounts")]  # once an hour
    clock.travel(3700)
    await told_of(5)
    assert await alerts(kit) == [("plugin_errors", "accounts")] * 2


async def test_a_background_task_is_restarted_then_its_plugin_is_held(
    make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.background_tasks.INITIAL_DELAY", 0.01)
    starts: list[str] = []

    async def start(self: Any, runtime: Any) -> None:
        async def die() -> None:
            starts.append("faulty")
            raise SystemExit(7)

        async def go_on() -> None:
            starts.append("steady")
            await asyncio.sleep(3600)

        runtime.supervise("die", die)
        runtime.supervise("go_on", go_on)

    kit = await make_kit(plugins=[plugin("faulty", start=start)])
    await until(lambda: kit.loaded("faulty").state == "quarantined")
    assert (starts.count("faulty"), starts.count("steady")) == (6, 1)  # once, and five times more
    assert kit.loaded("faulty").reason == "the background task faulty.die keeps failing"
    assert kit.kernel.registry.errors("faulty")[0].where == "task faulty.die"
    await asyncio.sleep(0.3)
    assert starts.count("faulty") == 6
    kit.kernel.registry.change_state("faulty", "active")
    await until(lambda: starts.count("faulty") > 6, 5)


async def test_its_callers_keep_their_credentials(make_kit: MakeKit) -> None:
    """In quarantine its routes answer as ever; out of service nobody is told that a token is dead."""
    kit = await make_kit()
    admin = await kit.as_user("admin")
    agent = (await admin.post("/agents", {"name": "one"})).json()["id"]
    token = (await admin.post(f"/agents/{agent}/tokens", {"name": "its own"})).json()["token"]
    bot = Client(kit.application.app, token)
    assert (await bot.get("/agents?limit=1")).status == 200
    kit.kernel.quarantine.suspend(kit.loaded("agents"), "a test")
    kit.kernel.credentials.forget(lambda principal: True)
    assert kit.loaded("agents").state == "quarantined"
    assert (await bot.get("/agents?limit=1")).status == 200
    assert (await Client(kit.application.app, "cra_" + "0" * 40).get("/agents?limit=1")).status == 401
    kit.kernel.registry.change_state("agents", "disabled", "admin")
    kit.kernel.credentials.forget(lambda principal: True)
    answer = await bot.get("/events?limit=1")
    assert (answer.status, answer.code) == (503, "plugin_failed")
    assert (await admin.get("/auth/me")).status == 200
