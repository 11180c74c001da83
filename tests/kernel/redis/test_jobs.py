"""`corral jobs` with Redis: RQ carries ids, the table decides; what RQ forgets or doubles makes no difference."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue, SimpleWorker
from tests.limits import Stopwatch

from corral import clock
from corral.config.model import Config
from corral.errors import Unavailable
from corral.jobs.job import JobRow, enqueue
from corral.plugins.discovery import discover
from corral.testing.database_servers import ValkeyServer
from corral.testing.kit import Kit
from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import JobsProcess
from corral_core.redis.service.queue import QUEUE

pytestmark = pytest.mark.redis

TALLY = '''
    """Counts by events, so that every effect can be counted."""

    from __future__ import annotations

    import asyncio
    import time
    from collections.abc import Iterable

    from corral.database.engine import Work
    from corral.events.event import Event, emit
    from corral.jobs.job import Job
    from corral.plugin import Plugin, hookimpl


    class Counted(Event, kw_only=True):
        """Something was counted."""

        event = "tally.counted"
        number: int


    def count(number: int) -> None:
        time.sleep(0.02)
        emit(Counted(number=number), object=("tally", str(number)))


    async def count_slowly(work: Work, number: int, seconds: float) -> None:
        await work(lambda: emit(Counted(number=-number), object=("tally", "begun")))
        await asyncio.sleep(seconds)
        await work(lambda: count(number))


    class TallyPlugin(Plugin):
        """Counts."""

        name = "tally"

        @hookimpl
        def corral_events(self) -> Iterable[type[Event]]:
            return [Counted]

        @hookimpl
        def corral_jobs(self) -> Iterable[Job]:
            return [
                Job("tally.count", count, max_attempts=50, lease_seconds=3),
                Job("tally.count_slowly", count_slowly, lease_seconds=60),
            ]
'''


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


class Installation:
    """A kernel that enqueues, as an API process does, and the environment of the processes that do the jobs."""

    def __init__(self, kit: Kit, environ: dict[str, str], folder: Path) -> None:
        self.kit, self.environ, self.folder = kit, environ, folder
        self._processes = 0

    def jobs(self, *arguments: str) -> JobsProcess:
        self._processes += 1
        return JobsProcess(self.environ, self.folder / f"jobs{self._processes}", arguments=arguments)

    async def enqueue(self, *numbers: int, name: str = "tally.count", **arguments: Any) -> None:
        def put() -> None:
            for number in numbers:
                enqueue(name, number=number, **arguments)

        await self.kit.kernel.database.work(put)

    async def counted(self) -> Counter[int]:
        """How often each number was counted."""
        return Counter(
            json.loads(event.data)["number"] for event in await self.kit.events() if event.type == "tally.counted"
        )

    async def wait_for(self, *numbers: int, seconds: float = 60.0) -> float:
        """Until all were counted; the time it took."""
        with Stopwatch() as watch:
            while missing := set(numbers) - set(await self.counted()):
                assert watch.seconds < seconds, f"{len(missing)} are missing"
                await asyncio.sleep(0.05)
        return watch.seconds

    async def states(self) -> Counter[str]:
        rows = await self.kit.kernel.database.work(lambda: list(JobRow.select()), read=True)
        return Counter(row.state for row in rows)


@pytest.fixture
async def installation(make_kit: Any, tmp_path: Path, database_url: str, valkey_server: ValkeyServer) -> Any:
    folder = PluginFolder(tmp_path / "plugins")
    folder.add("tally", TALLY)
    ours = [item for item in discover(Config()) if item.built_in]
    protected = sorted(item.name for item in ours if item.protection())
    others = [item.name for item in ours if item.name not in protected]
    (tmp_path / "corral.toml").write_text(
        f'[plugins]\ndir = "{folder.path}"\nenabled = ["tally"]\ndisabled = {json.dumps(others)}\n'
    )
    url = valkey_server.url()
    kit = await make_kit(
        plugins=[*sorted(item.name for item in ours if item.protection()), "tally"],
        config={"redis.url": url, "plugins.dir": str(folder.path)},
    )
    assert kit.loaded("tally").state == "active", kit.loaded("tally").reason
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    environ |= {
        "CORRAL_CONFIG": str(tmp_path / "corral.toml"),
        "CORRAL_DATA_DIR": str(tmp_path / "data"),
        "CORRAL_DATABASE_URL": database_url,
        "CORRAL_REDIS_URL": url,
        "CORRAL_RATE_LIMITS": "off",
    }
    return Installation(kit, environ, tmp_path)


@pytest.fixture(autouse=True)
def _unload() -> Iterator[None]:
    """The plugin lies in a folder of its own in each test."""
    yield
    for name in [name for name in sys.modules if name.startswith("corral_tally")]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.endswith("/plugins") or "pytest" not in path]


@pytest.fixture
def client(valkey_server: ValkeyServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey_server.url()) as connected:
        yield connected


@pytest.mark.one_engine
async def test_a_job_is_begun_at_once_and_leaves_nothing_in_redis(installation: Installation, client: Any) -> None:
    with installation.jobs() as process:
        await installation.enqueue(0)  # imports RQ
        await installation.wait_for(0)
        took = []
        for number in range(1, 6):
            await installation.enqueue(number)
            took.append(await installation.wait_for(number))
        assert sorted(took)[2] < 1.5, "the look at the table comes after 2 s"
        workers = SimpleWorker.all(connection=client)
        assert [worker.queue_names() for worker in workers] == [[QUEUE]]
        assert process.stop() == 0
    assert SimpleWorker.all(connection=client) == []
    assert Queue(QUEUE, connection=client, serializer="json").job_ids == []
    assert await installation.counted() == Counter(range(6))
    assert await installation.states() == {"done": 6}


@pytest.mark.one_engine
async def test_the_queue_holds_ids_alone_as_json(installation: Installation, client: Any) -> None:
    await installation.enqueue(7)
    queue = Queue(QUEUE, connection=client, serializer="json")
    while not queue.job_ids:  # noqa: ASYNC110  # a thread puts them there
        await asyncio.sleep(0.02)
    row = await installation.kit.kernel.database.work(lambda: JobRow.select().get(), read=True)
    (kept,) = queue.jobs
    assert (kept.id, list(kept.args), kept.kwargs) == (row.id, [row.id], {})
    assert json.loads(zlib.decompress(client.hget(kept.key, "data")))[2] == [row.id]


@pytest.mark.one_engine
async def test_an_emptied_redis_delays_no_job_by_more_than_five_seconds(
    installation: Installation, client: Any
) -> None:
    with installation.jobs() as process:
        assert process.process is not None
        while True:
            os.kill(process.process.pid, signal.SIGSTOP)
            with contextlib.suppress(Unavailable):  # it was stopped with SQLite's write lock in its hand
                await installation.enqueue(*range(30))
                break
            os.kill(process.process.pid, signal.SIGCONT)
            await asyncio.sleep(random.uniform(0.05, 0.3))  # so that it gets on, and is stopped elsewhere
        await asyncio.sleep(1)
        client.flushall()
        os.kill(process.process.pid, signal.SIGCONT)
        assert (
            await installation.wait_for(*range(30)) < 5 + 30 * 0.02 + os.getloadavg()[0]
        )  # a crowded machine is slow by itself
        assert await installation.counted() == Counter(range(30))


@pytest.mark.one_engine
async def test_jobs_are_done_while_redis_is_away_and_by_rq_again_afterwards(
    installation: Installation, valkey_server: ValkeyServer
) -> None:
    with installation.jobs() as process:
        await installation.enqueue(0)
        await installation.wait_for(0)
        valkey_server.kill()
        await installation.enqueue(*range(1, 11))
        assert await installation.wait_for(*range(1, 11)) < 6 + os.getloadavg()[0]
        valkey_server.restart()
        began, number, took = time.monotonic(), 11, 10.0
        while took > 1.5:
            assert time.monotonic() - began < 60, process.log[-3000:]
            await installation.enqueue(number)
            took = await installation.wait_for(number)
            number += 1
        assert process.stop() == 0
    assert await installation.counted() == Counter(range(number))


def refused(client: Any) -> int:
    """How many writes Redis has refused as a replica."""
    found: dict[str, Any] = client.info("errorstats")
    return int(found.get("errorstat_READONLY", {"count": 0})["count"])


@pytest.mark.one_engine
async def test_a_redis_that_takes_no_writes_is_told_of_once(installation: Installation, client: Any) -> None:
    """It became a replica. Each try to begin with it again is no news."""
    with installation.jobs() as process:
        await installation.enqueue(0)
        await installation.wait_for(0)
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        await installation.enqueue(1)
        await installation.wait_for(1)
        await until(lambda: "polling the database for jobs" in process.log)
        tries = refused(client)
        await until(lambda: refused(client) >= tries + 3)
        assert process.log.count("polling the database for jobs") == 1
        client.execute_command("REPLICAOF", "NO", "ONE")
        await installation.enqueue(2)
        await installation.wait_for(2)
        assert process.stop() == 0


async def test_a_killed_process_loses_no_job_and_doubles_no_effect(installation: Installation) -> None:
    random.seed(3)
    processes = [installation.jobs("--concurrency", "4") for _ in range(2)]
    numbers = range(240)
    try:
        for process in processes:
            process.start()
        for first in range(0, 240, 60):
            await installation.enqueue(*range(first, first + 60))
            await asyncio.sleep(random.uniform(0.2, 0.6))
            victim = random.choice(processes)
            victim.kill()
            victim.start()
        await installation.wait_for(*numbers)
        while (await installation.states()) != {"done": 240}:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    assert await installation.counted() == Counter(numbers)


@pytest.mark.one_engine
async def test_sigterm_lets_a_running_job_end(installation: Installation) -> None:
    with installation.jobs() as process:
        await installation.enqueue(1, name="tally.count_slowly", seconds=3)
        await installation.wait_for(-1)
        assert process.stop() == 0
    assert (await installation.counted())[1] == 1
    assert await installation.states() == {"done": 1}


@pytest.mark.one_engine
@pytest.mark.parametrize("with_redis", [True, False])
async def test_sighup_begins_again_as_the_same_process(installation: Installation, with_redis: bool) -> None:
    if not with_redis:
        del installation.environ["CORRAL_REDIS_URL"]
    with installation.jobs() as process:
        assert process.process is not None
        file = installation.folder / "corral.toml"
        good = file.read_text()
        file.write_text(f"{good}nonsense = 1\n")
        process.process.send_signal(signal.SIGHUP)
        await until(lambda: "reload failed" in process.log and "unknown key plugins.nonsense" in process.log)
        await installation.enqueue(1)
        await installation.wait_for(1)
        file.write_text(good)
        process.process.send_signal(signal.SIGHUP)
        await until(lambda: process.log.count("Jobs are running") == 2)
        await installation.enqueue(2)
        await installation.wait_for(2)
        assert process.stop() == 0


async def test_a_job_that_is_cut_is_given_back_without_an_attempt(installation: Installation) -> None:
    kernel = installation.kit.kernel
    await installation.enqueue(1, name="tally.count_slowly", seconds=60)
    await kernel.database.work(lambda: JobRow.update(run_at=clock.now(-5)).execute())
    kernel.supervisor.start("jobs", kernel.runner.run)
    await installation.wait_for(-1)
    await kernel.runner.drain(0.1)
    await kernel.supervisor.stop_task("jobs")
    row = await kernel.database.work(lambda: JobRow.select().get(), read=True)
    assert (row.state, row.attempts, row.lease) == ("queued", 0, None)
