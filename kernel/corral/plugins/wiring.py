"""Plugins and rooms become one: services made and given out, contributions bound and guarded, at boot."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import msgspec

from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions
from corral.config.model import Config
from corral.crypto import Keyring, Sealer
from corral.database.engine import Database, Work
from corral.database.sealed import SealedColumns
from corral.egress.client import Egress
from corral.errors import Refused
from corral.events.bus import Bus, MemoryBus
from corral.events.consumers import Consumer, Subscriber
from corral.events.feed import Feed
from corral.events.registry import EventTypes
from corral.jobs.queue import JobQueue
from corral.jobs.runner import InProcessRunner
from corral.metrics.requests import RequestMetrics
from corral.openapi import ApiDocument
from corral.plugin import Contributions, Installation, Provide, Settings
from corral.plugins import metrics
from corral.plugins.conflicts import refuse_clashes
from corral.plugins.container import Container, Scope
from corral.plugins.executor import PluginThreads
from corral.plugins.first_result import first_result
from corral.plugins.guard import Guard
from corral.plugins.guarded import Guards
from corral.plugins.hooks import asked_for
from corral.plugins.migrations import sealed_columns
from corral.plugins.quarantine import PluginQuarantine
from corral.plugins.record import ESSENTIAL, PluginRecord, attempt, block
from corral.plugins.registry import HookContributions, PluginRegistry
from corral.plugins.thread_exceptions import ThreadExceptions
from corral.plugins.watchdog import Watchdog
from corral.redact.redactor import Redactor
from corral.settings.kernel import JOBS_CONCURRENCY, KERNEL, KERNEL_SETTINGS, jobs_at_a_time
from corral.settings.registry import SettingsRegistry
from corral.storage.blobs import BlobStore, LocalBlobs
from corral.supervisor import Supervisor


class Wired:
    """Attributes are the rooms; `container` answers what the rest needs."""

    def __init__(self, config: Config, plugins: list[PluginRecord], database: Database, keyring: Keyring) -> None:
        self.config, self.plugins, self.database, self.keyring = config, plugins, database, keyring
        self.container = Container()
        self.settings = SettingsRegistry(config.pinned, self._is_shown, config.variables)
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
        self.threads = PluginThreads()
        self.warden = PluginQuarantine(self.registry, self.settings, self.threads)
        self.guards, self.watchdog = Guards(self.warden), Watchdog(self.warden)
        self.dying_threads = ThreadExceptions(self.warden, self.plugins)
        self.metrics.plugins = lambda: metrics.lines(self.plugins, self.guards.all, self.warden)
        self.runner: InProcessRunner
        self.door_watchers: list[Callable[[PluginRecord], None]] = []
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self.consumers: list[Consumer] = []
        self._following: list[Consumer] = []

    @property
    def active(self) -> list[PluginRecord]:
        """Active plugins in order of `requires`."""
        return [loaded for loaded in self.plugins if loaded.active]

    def wire(self) -> None:
        """Services, settings, events, jobs, routes. What fails leaves its plugin `failed`."""
        self._offer()
        self.settings.declare(KERNEL_SETTINGS, KERNEL)
        refuse_clashes(self.active)
        block(self.plugins)
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
        hooks: dict[str, tuple[str, Any]] = {}
        for loaded in self.active:
            attempt(loaded, lambda loaded=loaded: hooks.update(_hooks_of(loaded)))  # type: ignore[misc]  # bound per round
        for loaded in self.active:
            attempt(loaded, lambda loaded=loaded: self._enclose(loaded, hooks))  # type: ignore[misc]  # bound per round
            self._tidy(loaded)
            if not loaded.found.built_in:
                self.database.plugin_by_label |= {
                    f"consumer {item.name}": loaded.name for item, _ in loaded.of("_subscribers")
                }
                self.database.plugin_by_label |= {f"job {item.name}": loaded.name for item, _ in loaded.of("_jobs")}
        self._wire_runner()
        self.credentials.use([made for item in self.active for made in item.of("_authenticators")])

    def _tidy(self, loaded: PluginRecord) -> None:
        """Nothing of a plugin that failed stays registered, and what requires it is blocked."""
        if not loaded.active:
            self.container.drop(loaded.name)
            self.event_types.drop(loaded.name)
        block(self.plugins)

    def _offer(self) -> None:
        """What every plugin may ask the kernel for."""
        folder, url = self.config.files_dir, self.config.storage.url or ""
        offered: Mapping[Any, Any] = {
            Config: self.config,
            Database: self.database,
            Work: self.database.work,
            Keyring: self.keyring,
            Sealer: self.keyring,
            SealedColumns: sealed_columns(self.plugins),
            Settings: self.settings,
            SettingsRegistry: self.settings,
            BlobStore: LocalBlobs(folder) if folder else first_result(self.plugins, "corral_blob_store", url),
            Feed: self.feed,
            Bus: self.bus,
            Credentials: self.credentials,
            Permissions: Permissions(),
            RequestMetrics: self.metrics,
            EventTypes: self.event_types,
            Supervisor: self.supervisor,
            Contributions: HookContributions(self.plugins),
            PluginRegistry: self.registry,
            Egress: self.egress,
            Redactor: self.redactor,
            Installation: Installation.of(self.config),
            PluginQuarantine: self.warden,
            ApiDocument: ApiDocument(
                title="Corral", version=version("corral"), public_url=self.config.server.public_url
            ),
        }
        for kind, instance in offered.items():
            self.container.add(kind, instance)

    def room(self, loaded: PluginRecord) -> Scope:
        """What this plugin may be given."""
        kind = loaded.kind
        return Scope(loaded.name, frozenset(kind.requires if kind else ()), frozenset(kind.wants if kind else ()))

    def _wire_plugin(self, loaded: PluginRecord) -> None:
        for model in loaded.of("corral_models"):
            table = model._meta.table_name
            own = tuple(f"{prefix}_" for prefix in (loaded.name, *(loaded.kind.prefixes if loaded.kind else ())))
            if not table.startswith(own) and table != loaded.name:
                raise ValueError(f"table {table} must begin with {loaded.name}_")
        provides: list[Provide] = loaded.of("corral_services")
        loaded.contributions["_instances"] = self.container.build(self.room(loaded), provides)
        self.event_types.declare(loaded.name, loaded.of("corral_events"))
        self.settings.declare(loaded.of("corral_settings"), loaded.name)

    def _is_shown(self, plugin: str) -> bool:
        """Whether the settings of a plugin are: its own are kept while it is out of service, and hidden."""
        return plugin == KERNEL or any(
            loaded.name == plugin and loaded.state in ("active", "quarantined") for loaded in self.plugins
        )

    def _inject(self, loaded: PluginRecord) -> None:
        for instance in loaded.of("_instances"):
            self.container.inject(instance, self.room(loaded))

    def _bind(self, loaded: PluginRecord) -> None:
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

    def _enclose(self, loaded: PluginRecord, hooks: Mapping[str, tuple[str, Any]]) -> None:
        """From here on everything of it is called through its guards."""
        self.guards.enclose(loaded, hooks)
        loaded.contributions["_consumers"] = [self._consumer(loaded, *item) for item in loaded.of("_subscribers")]

    def _wire_runner(self) -> None:
        jobs = {job.name: (job, run) for loaded in self.active for job, run in loaded.of("_jobs")}
        schedules = {item.name: (item, run) for loaded in self.active for item, run in loaded.of("_schedules")}
        self.consumers = [consumer for loaded in self.active for consumer in loaded.of("_consumers")]
        names = ("_jobs", "_schedules")
        owners = {item.name: loaded for loaded in self.active for name in names for item, _ in loaded.of(name)}
        is_open, redact = (lambda name: owners[name].active), self.redactor.redact
        self.runner = InProcessRunner(self.database, jobs, schedules, is_open=is_open, redact=redact)
        self.settings.watch([JOBS_CONCURRENCY], lambda: self.runner.limit(jobs_at_a_time(self.settings)))
        self.container.add(InProcessRunner, self.runner)

    def _consumer(self, loaded: PluginRecord, subscriber: Subscriber, handle: Guard) -> Consumer:
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

    def close_door(self, loaded: PluginRecord) -> None:
        """A loaded plugin's state changed: who wants its services gets None or them again, its routes follow."""
        self.container.close(loaded.name, closed=not loaded.serves)
        for other in self.plugins:
            if other.serves:
                self._inject(other)
        for watcher in self.door_watchers:
            watcher(loaded)


def _hooks_of(owner: PluginRecord) -> dict[str, tuple[str, Any]]:
    """The hooks that a plugin offers to others, with its name and what contributions shall be."""
    return {
        name: (owner.name, asked_for(spec))
        for module in owner.of("corral_hookspecs")
        for name, spec in vars(module).items()
        if name.startswith("corral_")
    }
