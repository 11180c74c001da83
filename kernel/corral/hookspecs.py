"""Every hook of the kernel: the whole surface by which a plugin contributes.

Each is called once at boot for one plugin at a time. Plural names: everyone contributes a list. What is returned is
merged only if all hooks of the plugin succeeded. Order never carries meaning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
import pluggy

from corral.auth.principal import Authenticator
from corral.database.model import Model
from corral.events.bus import Bus
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes, Socket
from corral.jobs.job import Job, Schedule
from corral.jobs.queue import JobQueue
from corral.plugin import Gate, HealthCheck, Meter, Metric, Provide, Setting
from corral.storage.blobs import BlobStore

hookspec = pluggy.HookspecMarker("corral")


class Manager(pluggy.PluginManager):
    """Each plugin has one; pluggy looks so thoroughly at all that modules have that it would be a fifth of a boot."""

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        return getattr(getattr(module_or_class, name, None), "__dict__", {}).get(f"{self.project_name}_spec")


@hookspec
def corral_services() -> Iterable[Provide]:  # type: ignore[empty-body]
    """Services: types that other plugins and the own routes, jobs and subscribers may ask for."""


@hookspec
def corral_routes() -> Iterable[Routes]:  # type: ignore[empty-body]
    """Groups of HTTP routes."""


@hookspec
def corral_sockets() -> Iterable[Socket]:  # type: ignore[empty-body]
    """WebSocket endpoints."""


@hookspec
def corral_models() -> Iterable[type[Model]]:  # type: ignore[empty-body]
    """Tables; their names begin with the plugin's name, their migrations lie in `migrations/` beside `plugin.py`."""


@hookspec
def corral_events() -> Iterable[type[Event]]:  # type: ignore[empty-body]
    """Events that the plugin emits, with their visibility and payload."""


@hookspec
def corral_subscribers() -> Iterable[Subscriber]:  # type: ignore[empty-body]
    """Durable consumers of the event log: at least once, in order, in a unit that moves the cursor."""


@hookspec
def corral_jobs() -> Iterable[Job]:  # type: ignore[empty-body]
    """Background jobs that `enqueue` may name."""


@hookspec
def corral_schedules() -> Iterable[Schedule]:  # type: ignore[empty-body]
    """Jobs that run once every slot, whatever the number of processes."""


@hookspec
def corral_settings() -> Iterable[Setting[Any]]:  # type: ignore[empty-body]
    """Run-time settings of the category named like the plugin."""


@hookspec
def corral_authenticators() -> Iterable[type[Authenticator]]:  # type: ignore[empty-body]
    """Forms of credential; the classes are made like services, by constructor."""


@hookspec
def corral_gates() -> Iterable[Gate | Meter]:  # type: ignore[empty-body]
    """Checks before a route is looked up, and what counts requests."""


@hookspec
def corral_health_checks() -> Iterable[HealthCheck]:  # type: ignore[empty-body]
    """Dependencies shown at `/settings/health`."""


@hookspec
def corral_metrics() -> Iterable[Metric]:  # type: ignore[empty-body]
    """Series read at scrape time, with bounded labels."""


@hookspec
def corral_commands() -> Iterable[click.Command]:  # type: ignore[empty-body]
    """Commands of `corral`; called without a kernel."""


@hookspec
def corral_hookspecs() -> Iterable[Any]:  # type: ignore[empty-body]
    """Modules with hook specifications that this plugin offers to others."""


@hookspec(firstresult=True)
def corral_blob_store(url: str) -> BlobStore | None:
    """The store for a storage URL; None: not mine."""


@hookspec(firstresult=True)
def corral_bus(url: str) -> Bus | None:
    """The bus for a Redis URL; None: not mine."""


@hookspec(firstresult=True)
def corral_job_queue(url: str) -> JobQueue | None:
    """The shared queue of jobs for a Redis URL; None: not mine."""
