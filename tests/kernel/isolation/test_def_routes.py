"""Routes of third parties that hold up their unit: they are given up, named, and raised into again."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from tests.kernel.isolation.misbehaving import plugin, routes, until

from corral.plugins.quarantine import ABANDONED
from corral.testing.kit import make_kernel


@pytest.mark.parametrize("pause", ["loops", "sleeps"])
async def test_a_def_route_that_does_not_come_back_names_its_plugin(tmp_path: Path, pause: str) -> None:
    group, ended = routes("faulty"), threading.Event()

    @group.get("/hangs", needs="public")
    def hang() -> None:
        """Hang."""
        while not ended.is_set():
            if pause == "sleeps":
                ended.wait(600)

    async with make_kernel(tmp_path, plugins=[plugin("faulty", corral_routes=lambda self: [group])]) as kit:
        for number in (1, 2):
            answer = await kit.client.get("/faulty/hangs")
            assert (answer.status, answer.code, answer.json()["plugin"]) == (503, "dependency_unavailable", "faulty")
            assert [each.message for each in kit.kernel.registry.errors("faulty")] == [ABANDONED] * number
        assert kit.kernel.registry.errors("faulty")[0].where == "GET /faulty/hangs"
        assert kit.kernel.registry.error_counts("faulty") == (2, 2)
        lost = 2 if pause == "sleeps" else 0
        await until(lambda: kit.kernel.database.watchdog.lost_threads()["faulty"] == lost)
        await until(lambda: kit.kernel.database.connection_usage()[0] == 0)
        assert kit.loaded("faulty").active  # errors of routes never quarantine
        answer = await kit.client.get("/faulty/hangs")
        assert (answer.code, answer.json()["plugin"]) == ("plugin_failed", "faulty")
        if pause == "sleeps":  # but threads that are lost do
            await until(lambda: kit.loaded("faulty").state == "quarantined")
            assert "2 calls did not return; the last one in GET /faulty/hangs" in (kit.loaded("faulty").reason or "")
        ended.set()
        await until(lambda: kit.kernel.database.watchdog.lost_threads()["faulty"] == 0)
        assert (await kit.client.get("/faulty")).status == 200


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
async def test_an_interruption_that_a_route_raises_is_an_error_of_the_plugin(
    tmp_path: Path, error: type[BaseException]
) -> None:
    group = routes("faulty")

    @group.get("/in-a-thread", needs="public")
    def interrupt_thread() -> None:
        """Raise."""
        raise error

    @group.get("/on-the-loop", needs="public")
    async def interrupt_loop() -> None:
        """Raise."""
        raise error

    async with make_kernel(tmp_path, plugins=[plugin("faulty", corral_routes=lambda self: [group])]) as kit:
        for path in ("in-a-thread", "on-the-loop"):
            answer = await kit.client.get(f"/faulty/{path}")
            assert (answer.status, answer.code, answer.json()["plugin"]) == (500, "internal", "faulty")
            assert kit.kernel.registry.errors("faulty")[0].message == f"GET /faulty/{path}: {error.__name__}"


async def test_what_swallows_is_raised_into_again(tmp_path: Path) -> None:
    """Three times it is caught, and then comes through."""
    group, caught = routes("faulty"), list[float]()

    def spin() -> None:
        while True:
            time.sleep(0.001)  # leaves the processor to other tests

    @group.get("/swallows", needs="public")
    def swallow() -> None:
        """Swallow."""
        while len(caught) < 3:
            try:
                spin()
            except BaseException:
                caught.append(time.monotonic())

    async with make_kernel(tmp_path, plugins=[plugin("faulty", corral_routes=lambda self: [group])]) as kit:
        assert (await kit.client.get("/faulty/swallows")).status == 503
        await until(lambda: len(caught) == 3)
        assert 0.5 < caught[2] - caught[1] < 3
        await until(lambda: kit.kernel.database.watchdog.lost_threads()["faulty"] == 0)
        assert kit.loaded("faulty").active
