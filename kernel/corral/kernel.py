"""The composition root, which creates the kernel of an installation.

`boot()` loads the plugins, applies migrations and connects the components of the kernel; `start()` runs the kernel;
`stop()` shuts it down. Only `asgi` and `cli` access the kernel object; plugins never do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from typing import Any

from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions
from corral.background_tasks import Supervisor
from corral.config.model import Config
from corral.crypto import Keyring, KeyRotation, Sealer
from corral.database.connect import connect
from corral.database.engine import Database, Work
from corral.database.leases import release_leases
from corral.database.unit import Unit
from corral.egress.client import Egress
from corral.errors import StartupError
from corral.events.consumers import Consumer, Subscriber
from corral.events.event import EventTypes
from corral.events.live_feed import Bus, Feed, MemoryBus
from corral.events.log import write_events
from corral.http.routes import ServedRoutes
from corral.jobs.runner import JobRunner
from corral.jobs.shared_queue import SharedJobQueue
from corral.metrics.requests import RequestMetrics
from corral.plugin import Contributions, InstallationConfig, Settings
from corral.plugins.container import Container
from corral.plugins.discovery import discover
from corral.plugins.guard import Guards
from corral.plugins.hooks import first_result
from corral.plugins.loading import load
from corral.plugins.migrations import apply_migrations, disabled_by_admins, sealed_columns, select_keyring
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import PluginRecord, block_dependants
from corral.plugins.registry import PluginRegistry
from corral.plugins.runtime import LifecycleCallbacks, PluginRuntime
from corral.plugins.thread_pool import PluginThreads
from corral.plugins.wiring import PluginWiring
from corral.redact.redactor import Redactor
from corral.settings.kernel import JOBS_CONCURRENCY, KERNEL, KERNEL_SETTINGS, job_concurrency
from corral.settings.registry import SettingsRegistry
from corral.storage.blobs import BlobStore
from corral.watchdog import EventLoopWatchdog

log = logging.getLogger("corral.kernel")

START_SECONDS, STOP_SECONDS = 15.0, 10.0


def boot(config: Config, *, plugins: list[PluginRecord] | None = None, start_secret: bytes = b"") -> Kernel:
    """Create a kernel: load the plugins, apply migrations, and connect the components.

    By default, the installed plugins are discovered; tests pass `plugins` instead. Processes that are started together
    share `start_secret`, which they use for signatures if there is no master key. Raise `StartupError` if the
    installation cannot start (exit status 3), or `MigrationsPending` if migrations must be applied first (exit status
    4).
    """
    keyring = Keyring.load(config, start_secret=start_secret)
    section = config.database
    database = connect(section.url, synchronous=section.synchronous, pool_size=section.pool_size)
    try:
        records = plugins if plugins is not None else load(discover(config), config, off=disabled_by_admins(database))
        _check_enabled(config, records)
        apply_migrations(database, records, config)
        keyring = select_keyring(keyring, database, records, config)
        database.cursor_key = keyring.mac("list-cursor", b"v1")
        kernel = Kernel(config, records, database, keyring)
        kernel.wire()
    except BaseException:
        database.close()
        raise
    return kernel


def _check_enabled(config: Config, records: list[PluginRecord]) -> None:
    absent = sorted({*config.plugins.enabled} - {record.name for record in records})
    if absent and config.plugins.strict:
        raise StartupError(*[f"{name}: corral.toml enables this plugin, but it is not installed" for name in absent])
    for name in absent:
        log.warning("corral.toml enables a plugin that is not installed", extra={"plugin": name})


class Kernel:
    """The kernel of an installation. Holds all components as attributes, and starts and stops them."""

    def __init__(self, config: Config, plugins: list[PluginRecord], database: Database, keyring: Keyring) -> None:
        self.config, self.plugins, self.database, self.keyring = config, plugins, database, keyring
        redis = config.redis.url
        self.bus: Bus = first_result(plugins, "corral_bus", redis) if redis else MemoryBus()
        self.queue: SharedJobQueue | None = first_result(plugins, "corral_job_queue", redis) if redis else None
        self.feed, self.event_types = Feed(database, self.bus), EventTypes()
        self.settings = SettingsRegistry(config.pinned, self._are_settings_shown, config.variables)
        self.credentials, self.egress, self.metrics = Credentials(), Egress(config), RequestMetrics()
        self.redactor = Redactor()
        self.redactor.set_values("configuration", {**config.credentials(), **keyring.encoded_keys()})
        self.supervisor, self.lifecycle = Supervisor(), LifecycleCallbacks()
        self.registry = PluginRegistry(plugins, config.plugins, self.redactor, self.metrics)
        self.threads, self.loop_watch = PluginThreads(database.watchdog), EventLoopWatchdog(database.watchdog)
        self.quarantine = PluginQuarantine(self.registry, self.settings)
        self.guards = Guards(self.quarantine)
        self.container = Container()
        self.wiring = PluginWiring(plugins, self.container, self.settings, self.event_types, self.guards)
        self.registry.listeners.append(self.wiring.refresh)
        self.runner = JobRunner(database, self.redactor.redact)
        self.consumers: list[Consumer] = []
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"

    @property
    def active(self) -> list[PluginRecord]:
        """The active plugins, in the order in which they start."""
        return [record for record in self.plugins if record.active]

    def wire(self) -> None:
        """Register the kernel's services, connect plugins to services, and pass consumers and jobs to their runners."""
        for kind, service in self._services().items():
            self.container.add(kind, service)
        self.settings.declare(KERNEL_SETTINGS, KERNEL)
        self.wiring.wire()
        active = self.active
        self.credentials.set_authenticators([made for record in active for made in record.authenticators])
        self.database.jobs = frozenset(job.name for record in active for job in record.contributions_to("corral_jobs"))
        self.settings.watch([JOBS_CONCURRENCY], lambda: self.runner.set_concurrency(job_concurrency(self.settings)))
        for record in active:
            given = ("corral_jobs", "corral_schedules", "corral_subscribers")
            jobs, schedules, subscribers = map(record.contributions_to, given)
            self.runner.add(jobs, schedules, functools.partial(getattr, record, "active"))
            self.consumers += [self._create_consumer(record, item) for item in subscribers]
            if not record.found.built_in:  # third-party plugins share half of the database connections
                labels = [f"consumer {item.name}" for item in subscribers]
                labels += [f"job {item.name}" for item in [*jobs, *schedules]]
                self.database.plugin_by_label |= dict.fromkeys(labels, record.name)

    def _services(self) -> dict[Any, Any]:
        """Return the services of the kernel, which every plugin can request, as `{type: service}`."""
        config = self.config
        url = f"file://{config.files_dir}" if config.files_dir else config.storage.url or ""
        store = first_result(self.plugins, "corral_blob_store", url, required=config.storage.url is not None)
        under_their_class = (
            *(self.credentials, self.egress, self.event_types, self.feed, self.guards, self.metrics, self.quarantine),
            *(self.redactor, self.registry, self.settings, self.supervisor, sealed_columns(self.plugins)),
            *(InstallationConfig.from_config(config), Permissions(), ServedRoutes(), self.runner),
        )
        return {
            **{type(service): service for service in under_their_class},
            **({} if store is None else {BlobStore: store}),
            Sealer: self.keyring,
            KeyRotation: self.keyring,
            Database: self.database,
            Work: self.database.work,
            Settings: self.settings,
            Bus: self.bus,
            Contributions: self.registry,
        }

    def _are_settings_shown(self, plugin: str) -> bool:
        """Return whether users can see the settings of a plugin.

        The stored settings of a plugin that is out of service are kept, but they are hidden.
        """
        record = self.registry.get(plugin)
        return plugin == KERNEL or (record is not None and record.in_service)

    def _create_consumer(self, record: PluginRecord, subscriber: Subscriber) -> Consumer:
        types = self.event_types.expand(subscriber.events)
        return Consumer(self.feed, subscriber, types, self._holder, lambda: record.active)

    def block_dependants(self, before: list[PluginRecord]) -> None:
        """Block the plugins that require a failed plugin.

        `before` contains the plugins that were active before the failure. Listeners are notified about those of them
        that are no longer active.
        """
        block_dependants(self.plugins)
        for record in before:
            if not record.active:
                self.registry.publish(record)

    def refuse_without_essentials(self) -> None:
        """Raise `StartupError` if an essential plugin is out of service.

        In strict mode, also raise `StartupError` if any plugin is `failed` or `blocked`.
        """
        strict = self.config.plugins.strict
        broken = [
            f"{record.name}: {record.reason}"
            for record in self.plugins
            if (record.protection == "essential" and not record.in_service)
            or (strict and record.state in ("failed", "blocked"))
        ]
        if broken:
            raise StartupError(*broken)

    async def start(self, *, jobs: bool = True, share: bool = False) -> None:
        """Start the event feed and the plugins on the running event loop.

        If `jobs` is true, this process also runs jobs, schedules and consumers. If the installation has a shared job
        queue, this process announces new jobs through the queue if `jobs` is false or `share` is true.
        """
        asyncio.get_running_loop().set_default_executor(self.threads)
        self.loop_watch.start()
        self.database.deliver_on(asyncio.get_running_loop())
        self.database.committed = self._on_commit
        if self.queue is not None and (share or not jobs):
            await self.queue.start()
            self.runner.queue = self.queue
        await self.feed.start()
        self.supervisor.start("events.feed", self.feed.run)
        if self.database.kind == "postgresql":
            self.supervisor.start("events.sequencer", self.feed.run_sequencer)
        for record in self.plugins:
            if record.in_service:
                await self._start_plugin(record)
        self.refuse_without_essentials()
        if jobs:
            self.supervisor.start("jobs", self.runner.run)
            await self.database.work(lambda: [consumer.create_cursor() for consumer in self.consumers])
            for consumer in self.consumers:
                self.supervisor.start(f"consumer {consumer.name}", consumer.run)

    async def _start_plugin(self, record: PluginRecord) -> None:
        """Start one plugin, and mark it as `failed` if its `start()` raises an exception.

        A third-party plugin is also marked as `failed` if its `start()` takes longer than `START_SECONDS`.
        """
        before, me = self.active, asyncio.current_task()
        limit = None if record.found.built_in else START_SECONDS
        runtime = self._create_runtime(record)
        try:
            assert record.plugin is not None
            async with asyncio.timeout(limit) as patience:
                await record.plugin.start(runtime)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or (me is not None and me.cancelling()):
                raise
            record.fail(f"start() took longer than {limit:g} s" if patience.expired() else error)
            await runtime.end_tasks()
            self.block_dependants(before)

    async def announce_serving(self, address: str) -> None:
        """Record that the server accepts connections at `address`, and call the plugins' `when_serving` callbacks."""
        self.lifecycle.address = address
        self.egress.deny_own_server(self.config.server.bind, address)
        for run in self.lifecycle.serving:
            await run(address)

    async def drain(self, seconds: float) -> None:
        """Before the server stops, let running jobs finish and call the `when_draining` callbacks.

        Waits for at most `seconds`.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(self.runner.drain(seconds), *[run() for run in self.lifecycle.draining])

    async def stop(self) -> None:
        """Stop plugins, then background tasks, then connections."""
        for record in reversed(self.plugins):
            if record.in_service and record.plugin is not None:
                await self._create_runtime(record).guarded_callback("stop", record.plugin.stop, STOP_SECONDS)()
        await self.supervisor.stop()
        # Releasing the leases lets other processes take over at once. If the database is unreachable, the leases
        # expire. Only processes that run jobs hold any.
        if self.runner.started.is_set():
            await asyncio.gather(self.database.work(lambda: release_leases(self._holder)), return_exceptions=True)
        await self.bus.stop()
        if self.queue is not None:
            await self.queue.stop()
        self.loop_watch.stop()
        self.database.close_loop_connection()
        await asyncio.to_thread(self.database.close)

    def _create_runtime(self, record: PluginRecord) -> PluginRuntime:
        return PluginRuntime(record, self.container, self.guards, self.registry, self.supervisor, self.lifecycle)

    def _on_commit(self, units: list[Unit]) -> None:
        emitted = [row["type"] for unit in units for write, row in unit.collected if write is write_events]
        self.metrics.events.update(emitted)
        self.feed.on_commit(bool(emitted))
        if due := [str(row["id"]) for unit in units for _, row in unit.jobs if row["run_at"] <= row["created_at"]]:
            self.runner.announce(due)
