"""The bell between processes: heard at once, missed by nobody, waited for by nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import redis
from tests.limits import Stopwatch

from corral.errors import StartupError
from corral.events import live_feed
from corral.events.event import SystemAlert, emit
from corral.testing.database_servers import ValkeyServer
from corral.testing.kit import Kit
from corral_core.redis.service.bus import CHANNEL, RedisBus

pytestmark = pytest.mark.redis


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    """The time it took."""
    with Stopwatch() as watch:
        while not condition():
            assert watch.seconds < seconds
            await asyncio.sleep(0.005)
    return watch.seconds


def bus_of(kit: Kit) -> RedisBus:
    bus = kit.kernel.bus
    assert isinstance(bus, RedisBus)
    return bus


class Pair:
    """Two kernels of one installation: `tell()` in the one, `heard` in the other."""

    def __init__(self, speaker: Kit, listener: Kit) -> None:
        self.speaker, self.listener = speaker, listener
        self.heard: list[str] = []
        listener.kernel.feed.watch(lambda records: self.heard.extend(record.object_id for record in records))

    async def connected(self) -> float:
        return await until(lambda: bus_of(self.speaker).connected and bus_of(self.listener).connected)

    async def tell(self, name: str) -> float:
        """Emit, and how long it took until it was heard."""
        alert = SystemAlert(kind="disk_low", severity="info", title=name, detail=name, object={"type": "x", "id": name})
        await self.speaker.kernel.database.work(lambda: emit(alert, object=("disk", name)))
        return await until(lambda: name in self.heard)


@pytest.fixture
async def pair(make_kit: Any, valkey_server: ValkeyServer) -> Pair:
    config = {"redis.url": valkey_server.url()}
    made = Pair(await make_kit(plugins=[], config=config), await make_kit(plugins=[], config=config))
    await made.connected()
    return made


async def test_a_ring_is_heard_by_the_other_process(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "POLL_SECONDS", 60.0)  # only notifications are left
    await pair.tell("the last one that the look at the log may have found")
    took = sorted([await pair.tell(f"disk {number}") for number in range(20)])
    assert took[10] < 0.25, took
    assert pair.heard[1:] == [f"disk {number}" for number in range(20)]


async def test_without_its_server_nobody_waits_and_nothing_is_missed(
    pair: Pair, valkey_server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bus_of(pair.listener).health()[0] == "ok"
    valkey_server.kill()
    await until(lambda: not bus_of(pair.listener).connected)
    assert bus_of(pair.listener).health()[0] == "degraded"
    for number in range(3):
        with Stopwatch() as watch:
            bus_of(pair.speaker).notify()
        assert watch.seconds < 0.5  # to wait for a connection would take longer
        assert await pair.tell(f"disk {number}") < 2.0
    valkey_server.restart()
    assert await pair.connected() < 10.0
    monkeypatch.setattr(live_feed, "POLL_SECONDS", 60.0)
    await pair.tell("the last one that the look at the log may have found")
    await pair.tell("by notification again")
    assert len(pair.heard) == len(set(pair.heard)) == 5


async def test_a_server_that_hangs_holds_nobody_up(pair: Pair, valkey_server: ValkeyServer) -> None:
    os.kill(valkey_server.pid, signal.SIGSTOP)
    try:
        took = [await pair.tell(f"disk {number}") for number in range(5)]
    finally:
        os.kill(valkey_server.pid, signal.SIGCONT)
    assert max(took) < 2.0
    await pair.tell("when it goes on")


async def test_a_subscription_that_is_cut_comes_back(pair: Pair, valkey_server: ValkeyServer) -> None:
    with redis.Redis.from_url(valkey_server.url()) as client:
        assert dict(client.pubsub_numsub(CHANNEL)) == {CHANNEL.encode(): 2}
        client.client_kill_filter(_type="pubsub", skipme=True)
        await until(lambda: dict(client.pubsub_numsub(CHANNEL)) == {CHANNEL.encode(): 2})
        assert set(client.keys("*")) == set()  # a bell leaves nothing behind


async def test_a_url_that_is_none_is_refused(make_kit: Any) -> None:
    with pytest.raises(StartupError, match=r"redis\.url: "):
        await make_kit(plugins=[], config={"redis.url": "redis://localhost:port/0"})


def test_without_a_url_neither_client_is_loaded() -> None:
    modules = "corral_core.redis.plugin, corral.cli.serve, corral.cli.jobs"
    code = f"import sys, {modules}; print({{'redis', 'rq'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
