"""The composition root: config to a running kernel. `boot()` wires, `start()` runs, `stop()` ends.

No god object: plugins never see the kernel; only `asgi` and `cli` do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from corral.config.model import Config
from corral.crypto import Keyring
from corral.database.connect import connect
from corral.database.engine import Database
from corral.database.unit import Unit
from corral.errors import Refused
from corral.events import log as event_log
from corral.jobs import job as job_rows
from corral.plugins.background import PluginTasks
from corral.plugins.discovery import discover
from corral.plugins.loading import load
from corral.plugins.migrations import apply_migrations, taken_out, unlock
from corral.plugins.record import PluginRecord, block, fail
from corral.plugins.runtime import PluginRuntime
from corral.plugins.wiring import Wired

log = logging.getLogger("corral.kernel")

START_SECONDS, STOP_SECONDS = 15.0, 10.0


class Kernel(Wired):
    """A wired installation that can be started and stopped."""

    def __init__(self, config: Config, plugins: list[PluginRecord], database: Database, keyring: Keyring) -> None:
        super().__init__(config, plugins, database, keyring)
        self.address: str | None = None
        self._serving: list[Callable[[str], Awaitable[None]]] = []
        self._draining: list[Callable[[], Awaitable[None]]] = []
        self.first_admin_hint = ""

    async def start(self, *, jobs: bool = True, share: bool = False) -> None:
        """Start the feed, the plugins and, with `jobs`, jobs, schedules and consumers; on the running loop.

        New jobs are announced to the shared queue, if there is one, when this process does none, or is to `share`.
        """
        asyncio.get_running_loop().set_default_executor(self.threads)
        self.watchdog.start()
        self.dying_threads.start()
        self.database.attach(asyncio.get_running_loop())
        self.database.committed = self._committed
        if self.queue is not None and (share or not jobs):
            await self.queue.start()
            self.runner.queue = self.queue
        await self.feed.start()
        self.supervisor.start("events.feed", self.feed.follow)
        if self.database.kind == "postgresql":
            self.supervisor.start("events.sequencer", self.feed.sequence)
        for loaded in self.plugins:
            if loaded.serves:
                await self._start_plugin(loaded)
        self.refuse_without_essentials()
        if jobs:
            self.supervisor.start("jobs", self.runner.run)
            for consumer in self.consumers:
                await consumer.begin()
                self._following.append(consumer)
                self.supervisor.start(f"consumer {consumer.name}", consumer.run)

    async def _start_plugin(self, loaded: PluginRecord) -> None:
        """One that raises is out, a third party's that does not come back too, and so is what requires it."""
        before, me = self.active, asyncio.current_task()
        runtime, limit = PluginRuntime(self, loaded), None if loaded.found.built_in else START_SECONDS
        try:
            assert loaded.plugin is not None
            async with asyncio.timeout(limit) as patience:
                await loaded.plugin.start(runtime)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or (me is not None and me.cancelling()):
                raise
            fail(loaded, f"start() took longer than {limit:g} s" if patience.expired() else error)
            await asyncio.gather(*map(self.supervisor.end, runtime.supervised))
            block(self.plugins)
            for item in before:
                if not item.active:
                    self.close_door(item)

    async def serving(self, address: str) -> None:
        """The server accepts connections at `address`."""
        self.address = address
        self.egress.register_server(self.config.server.bind, address)
        for run in self._serving:
            await run(address)

    async def drain(self, seconds: float) -> None:
        """Before the server stops: what serves through it (the embedded worker) ends first, and jobs that run."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(self.runner.settle(seconds), *[run() for run in self._draining])

    async def stop(self) -> None:
        """End background work, plugins and connections, in that order."""
        for loaded in reversed(self.plugins):
            if loaded.serves and loaded.plugin is not None:
                await self.tasks_of(loaded).once("stop", loaded.plugin.stop, STOP_SECONDS)()
        await self.supervisor.stop()
        # Others follow at once. What cannot be given up, since the database is away, ends by itself.
        await asyncio.gather(*[consumer.stop() for consumer in self._following], return_exceptions=True)
        await self.bus.stop()
        if self.queue is not None:
            await self.queue.stop()
        self.database.detach()
        await asyncio.to_thread(self.database.close)
        self.watchdog.stop()
        self.dying_threads.stop()

    def _committed(self, units: list[Unit]) -> None:
        emitted = [item for unit in units for item in unit.events]
        for item in emitted:
            self.metrics.events[item.event.event] += 1
        self.feed.committed(bool(emitted))
        if due := [str(row["id"]) for unit in units for row in unit.jobs if row["run_at"] <= row["created_at"]]:
            self.runner.announce(due)

    def tasks_of(self, loaded: PluginRecord) -> PluginTasks:
        """What guards the background tasks of a plugin."""
        return PluginTasks(self.warden, self.guards, loaded, self.registry)

    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None:
        """Call `run` once the server listens."""
        self._serving.append(run)

    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None:
        """Call `run` before the server stops."""
        self._draining.append(run)


def boot(
    config: Config,
    *,
    plugins: list[PluginRecord] | None = None,
    migrations: bool | None = None,
    create_keys: bool = True,
) -> Kernel:
    """Load, migrate and wire. `plugins` replaces discovery (tests); `migrations` None: as configured by engine.

    Raises `Refused` (exit 3) and `Pending` (exit 4).
    """
    keyring = Keyring.load(config)
    database = connect(
        config.database.url, synchronous=config.database.synchronous, pool_size=config.database.pool_size
    )
    try:
        loaded = plugins if plugins is not None else load(discover(config), config, off=taken_out(database))
        absent = sorted({*config.plugins.enabled} - {item.name for item in loaded})
        if absent and config.plugins.strict:
            raise Refused(*[f"{name}: corral.toml enables it, and it is not installed" for name in absent])
        for name in absent:
            log.warning("corral.toml enables a plugin that is not installed", extra={"plugin": name})
        apply_migrations(database, loaded, config, migrations)
        keyring = unlock(keyring, database, loaded, config, create=create_keys)
        database.cursor_key = keyring.mac("list-cursor", b"v1")
        database.flush = _flush
        kernel = Kernel(config, loaded, database, keyring)
        kernel.wire()
    except BaseException:
        database.close()
        raise
    return kernel


def _flush(unit: Unit) -> None:
    """Row changes are done; now what waited for that, then audit, jobs and events, in this order."""
    for finish in unit.before:
        finish()
    for write in unit.audit:
        write()
    job_rows.write(unit)
    event_log.write(unit)
