"""The composition root: config to a running kernel. `boot()` wires, `start()` runs, `stop()` ends.

No god object: plugins never see the kernel; only `asgi` and `cli` do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

import msgspec

from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions
from corral.config import Config
from corral.container import Container, Room
from corral.crypto import Keyring
from corral.database.connect import connect
from corral.database.engine import Database, Work
from corral.database.sealed import SealedColumns
from corral.database.unit import Unit
from corral.egress.client import Egress
from corral.errors import Refused
from corral.events import log as event_log
from corral.events.bus import Bus, MemoryBus
from corral.events.consumers import Consumer, Subscriber
from corral.events.feed import Feed
from corral.events.registry import EventTypes
from corral.http.metrics import RequestMetrics
from corral.isolation import figures
from corral.isolation.guard import Guard
from corral.isolation.items import Guards, asked_for
from corral.isolation.tasks import PluginTasks
from corral.isolation.threads import Threads
from corral.isolation.warden import Warden
from corral.isolation.watchdog import Watchdog
from corral.jobs import job as job_rows
from corral.jobs.queue import JobQueue
from corral.jobs.runner import InProcessRunner
from corral.kernel_settings import JOBS_CONCURRENCY, jobs_at_a_time
from corral.loader import ESSENTIAL, Loaded, attempt, block, discover, fail, first_result, load
from corral.openapi import ApiDocument
from corral.plugin import Contributions, Installation, Provide, Settings
from corral.plugin_admin import HookContributions, PluginRegistry
from corral.redact.redactor import Redactor
from corral.runtime import PluginRuntime
from corral.settings import SettingsRegistry
from corral.storage.blobs import BlobStore, LocalBlobs
from corral.supervisor import Supervisor
from corral.upgrade import apply_migrations, sealed_columns, taken_out, unlock

log = logging.getLogger("corral.kernel")

STOP_SECONDS = 10.0


class Kernel:
    """A wired installation. Attributes are the rooms; `container` answers what the rest needs."""

    def __init__(self, config: Config, plugins: list[Loaded], database: Database, keyring: Keyring) -> None:
        self.config, self.plugins, self.database, self.keyring = config, plugins, database, keyring
        self.container = Container()
        self.settings = SettingsRegistry(config.pinned, self._is_shown)
        redis = config.redis.url
        self.bus: Bus = first_result(plugins, "corral_bus", redis) if redis else MemoryBus()
        self.queue: JobQueue | None = first_result(plugins, "corral_job_queue", redis) if redis else None
        self.feed = Feed(database, self.bus)
        self.credentials = Credentials()
        self.metrics = RequestMetrics()
        self.egress = Egress(config)
        self.redactor = Redactor()
        self.redactor.set_values("configuration", {**config.credentials(), **keyring.credentials()})
        self.supervisor = Supervisor()
        self.event_types = EventTypes()
        self.registry = PluginRegistry(self)
        self.threads = Threads()
        self.warden = Warden(self.registry, self.settings, self.threads)
        self.guards, self.watchdog = Guards(self.warden), Watchdog(self.warden)
        self.metrics.plugins = lambda: figures.lines(self.plugins, self.guards.all, self.warden)
        self.runner: InProcessRunner
        self.door_watchers: list[Callable[[Loaded], None]] = []
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self.address: str | None = None
        self._consumers: list[Consumer] = []
        self._serving: list[Callable[[str], Awaitable[None]]] = []
        self._draining: list[Callable[[], Awaitable[None]]] = []
        self.first_admin_hint = ""

    # -- wiring, at boot

    @property
    def active(self) -> list[Loaded]:
        """Active plugins in order of `requires`."""
        return [loaded for loaded in self.plugins if loaded.active]

    def wire(self) -> None:
        """Services, settings, events, jobs, routes. What fails leaves its plugin `failed`."""
        self._offer()
        for loaded in list(self.active):
            if loaded.active:
                attempt(loaded, lambda loaded=loaded: self._wire_plugin(loaded))  # type: ignore[misc]  # bound per round
                self._tidy(loaded)
        self.container.get(Permissions).declare(
            permission for loaded in self.active if loaded.kind for permission in loaded.kind.permissions
        )
        for loaded in self.active:
            if loaded.active:
                attempt(loaded, lambda loaded=loaded: self._bind(loaded))  # type: ignore[misc]  # bound per round
            self._tidy(loaded)
        for loaded in self.active:
            self._enclose(loaded)
            if not loaded.found.built_in:
                self.database.rooms |= {f"consumer {item.name}": loaded.name for item, _ in loaded.of("_subscribers")}
                self.database.rooms |= {f"job {item.name}": loaded.name for item, _ in loaded.of("_jobs")}
        self._wire_runner()
        self.credentials.use([made for item in self.active for made in item.of("_authenticators")])

    def _tidy(self, loaded: Loaded) -> None:
        """Nothing of a plugin that failed stays registered, and what requires it is blocked."""
        if not loaded.active:
            self.container.drop(loaded.name)
            self.event_types.drop(loaded.name)
        block(self.plugins)

    def _offer(self) -> None:
        """What every plugin may ask the kernel for."""
        folder, url = self.config.files_dir, self.config.storage.url or ""
        offered: Mapping[Any, Any] = {
            Config: self.config, Database: self.database, Work: self.database.work, Keyring: self.keyring,
            SealedColumns: sealed_columns(self.plugins), Settings: self.settings, SettingsRegistry: self.settings,
            BlobStore: LocalBlobs(folder) if folder else first_result(self.plugins, "corral_blob_store", url),
            Feed: self.feed, Bus: self.bus, Credentials: self.credentials, Permissions: Permissions(),
            RequestMetrics: self.metrics, EventTypes: self.event_types, Supervisor: self.supervisor,
            Contributions: HookContributions(self.plugins), PluginRegistry: self.registry, Egress: self.egress,
            Redactor: self.redactor, Installation: Installation.of(self.config), Warden: self.warden,
            ApiDocument: ApiDocument(title="Corral", version=version("corral"),
            public_url=self.config.server.public_url),
        }  # fmt: skip
        for kind, instance in offered.items():
            self.container.add(kind, instance)

    def room(self, loaded: Loaded) -> Room:
        """What this plugin may be given."""
        kind = loaded.kind
        return Room(loaded.name, frozenset(kind.requires if kind else ()), frozenset(kind.wants if kind else ()))

    def _wire_plugin(self, loaded: Loaded) -> None:
        for model in loaded.of("corral_models"):
            table = model._meta.table_name
            if not table.startswith(f"{loaded.name}_") and table != loaded.name:
                raise ValueError(f"table {table} must begin with {loaded.name}_")
        provides: list[Provide] = loaded.of("corral_services")
        loaded.contributions["_instances"] = self.container.build(self.room(loaded), provides)
        self.event_types.declare(loaded.name, loaded.of("corral_events"))
        self.settings.declare(loaded.of("corral_settings"), loaded.name)

    def _is_shown(self, plugin: str) -> bool:
        """Whether the settings of a plugin are: its own are kept while it is out of service, and hidden."""
        return any(loaded.name == plugin and loaded.state in ("active", "quarantined") for loaded in self.plugins)

    def _inject(self, loaded: Loaded) -> None:
        for instance in loaded.of("_instances"):
            self.container.inject(instance, self.room(loaded))

    def _bind(self, loaded: Loaded) -> None:
        """Fill in what it wants, and the services of its jobs, schedules, consumers and authenticators."""
        self._inject(loaded)
        room, bind = self.room(loaded), self.container.bind
        loaded.contributions.update(
            _jobs=[(job, bind(job.run, room)) for job in loaded.of("corral_jobs")],
            _schedules=[(schedule, bind(schedule.run, room)) for schedule in loaded.of("corral_schedules")],
            _subscribers=[
                (subscriber, bind(subscriber.handle, room, skip=("event",)))
                for subscriber in loaded.of("corral_subscribers")
            ],
            corral_metrics=[
                msgspec.structs.replace(metric, collect=bind(metric.collect, room))
                for metric in loaded.of("corral_metrics")
            ],
            _authenticators=[self.container.call(kind, room) for kind in loaded.of("corral_authenticators")],
        )

    def _enclose(self, loaded: Loaded) -> None:
        """From here on everything of it is called through its guards."""
        hooks = {
            name: (owner.name, asked_for(spec))
            for owner in self.active
            for module in owner.of("corral_hookspecs")
            for name, spec in vars(module).items()
            if name.startswith("corral_")
        }
        self.guards.enclose(loaded, hooks)
        loaded.contributions["_consumers"] = [self._consumer(loaded, *item) for item in loaded.of("_subscribers")]

    def _wire_runner(self) -> None:
        jobs = {job.name: (job, run) for loaded in self.active for job, run in loaded.of("_jobs")}
        schedules = {item.name: (item, run) for loaded in self.active for item, run in loaded.of("_schedules")}
        self._consumers = [consumer for loaded in self.active for consumer in loaded.of("_consumers")]
        names = ("_jobs", "_schedules")
        owners = {item.name: loaded for loaded in self.active for name in names for item, _ in loaded.of(name)}
        is_open, redact = (lambda name: owners[name].active), self.redactor.redact
        self.runner = InProcessRunner(self.database, jobs, schedules, is_open=is_open, redact=redact)
        self.settings.watch([JOBS_CONCURRENCY], lambda: self.runner.limit(jobs_at_a_time(self.settings)))
        self.container.add(InProcessRunner, self.runner)

    def _consumer(self, loaded: Loaded, subscriber: Subscriber, handle: Guard) -> Consumer:
        types = self.event_types.expand(subscriber.events)
        name, is_open = subscriber.name, lambda: loaded.active
        return Consumer(self.database, self.feed, name, types, handle, self.holder, is_open, handle.tentatively)

    def refuse_without_essentials(self) -> None:
        """Raise `Refused` when a plugin failed without which gates would be missing, or any did in strict mode."""
        broken = [f"{item.name}: {item.reason}" for item in self.plugins if item.name in ESSENTIAL and not item.serves]
        if broken:
            raise Refused(*broken)
        if self.config.plugins.strict:
            failed = [f"{item.name}: {item.reason}" for item in self.plugins if item.state in ("failed", "blocked")]
            if failed:
                raise Refused(*failed)

    # -- running

    async def start(self, *, jobs: bool = True, share: bool = False) -> None:
        """Start the feed, the plugins and, with `jobs`, jobs, schedules and consumers; on the running loop.

        New jobs are announced to the shared queue, if there is one, when this process does none, or is to `share`.
        """
        asyncio.get_running_loop().set_default_executor(self.threads)
        self.watchdog.start()
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
            for consumer in self._consumers:
                await consumer.begin()
                self.supervisor.start(f"consumer {consumer.name}", consumer.run)

    async def _start_plugin(self, loaded: Loaded) -> None:
        """One that raises is out, and so is what requires it; `SystemExit` is no exception."""
        before = self.active
        try:
            assert loaded.plugin is not None
            await loaded.plugin.start(PluginRuntime(self, loaded))
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:
            fail(loaded, error)
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
        await self.bus.stop()
        if self.queue is not None:
            await self.queue.stop()
        await asyncio.to_thread(self.database.close)
        self.watchdog.stop()

    def close_door(self, loaded: Loaded) -> None:
        """A loaded plugin's state changed: who wants its services gets None or them again, its routes follow."""
        self.container.close(loaded.name, closed=not loaded.serves)
        for other in self.plugins:
            if other.serves:
                self._inject(other)
        for watcher in self.door_watchers:
            watcher(loaded)

    def _committed(self, units: list[Unit]) -> None:
        emitted = [item for unit in units for item in unit.events]
        for item in emitted:
            self.metrics.events[item.event.event] += 1
        self.feed.committed(bool(emitted))
        if due := [str(row["id"]) for unit in units for row in unit.jobs if row["run_at"] <= row["created_at"]]:
            self.runner.announce(due)

    def tasks_of(self, loaded: Loaded) -> PluginTasks:
        """What guards the background tasks of a plugin."""

        def record(where: str, error: BaseException) -> None:
            self.registry.record(loaded.name, where, error, None)

        return PluginTasks(self.warden, self.guards, loaded, record)

    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None:
        """Call `run` once the server listens."""
        self._serving.append(run)

    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None:
        """Call `run` before the server stops."""
        self._draining.append(run)


def boot(
    config: Config, *, plugins: list[Loaded] | None = None, migrations: bool | None = None, create_keys: bool = True
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
