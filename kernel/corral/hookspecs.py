"""All hook specifications of the kernel. A plugin contributes to Corral only through these hooks.

Each hook is called once at boot, for one plugin at a time. A hook with a plural name returns a list. The results of a
plugin are used only if all of its hooks succeed. The order in which plugins are called does not matter, and neither
does the order of the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
import pluggy

from corral.auth.principal import Authenticator
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.events.live_feed import Bus
from corral.http.routes import Routes, Socket
from corral.jobs.job import Job, Schedule
from corral.jobs.shared_queue import SharedJobQueue
from corral.plugin import Gate, HealthCheck, Metric, Provide, RateLimiter, Setting
from corral.storage.blobs import BlobStore

hookspec = pluggy.HookspecMarker("corral")


@hookspec
def corral_services() -> Iterable[Provide]:  # type: ignore[empty-body]
    """Return services for other plugins and for this plugin's routes, jobs and subscribers.

    A function or constructor receives a service through a parameter that is annotated with the service's type.
    """


@hookspec
def corral_routes() -> Iterable[Routes]:  # type: ignore[empty-body]
    """Return groups of HTTP routes."""


@hookspec
def corral_sockets() -> Iterable[Socket]:  # type: ignore[empty-body]
    """Return WebSocket endpoints."""


@hookspec
def corral_models() -> Iterable[type[Model]]:  # type: ignore[empty-body]
    """Return database models.

    Table names begin with the plugin's name. The migrations are in `migrations/` next to `plugin.py`.
    """


@hookspec
def corral_events() -> Iterable[type[Event]]:  # type: ignore[empty-body]
    """Return the events that the plugin emits, with their visibility and payload."""


@hookspec
def corral_subscribers() -> Iterable[Subscriber]:  # type: ignore[empty-body]
    """Return durable consumers of the event log.

    Each event is delivered at least once and in order, in a unit of work that also advances the consumer's cursor.
    """


@hookspec
def corral_jobs() -> Iterable[Job]:  # type: ignore[empty-body]
    """Return background jobs. `enqueue` queues a job by name."""


@hookspec
def corral_schedules() -> Iterable[Schedule]:  # type: ignore[empty-body]
    """Return periodic jobs. In each period, one of the processes claims the job and runs it."""


@hookspec
def corral_settings() -> Iterable[Setting[Any]]:  # type: ignore[empty-body]
    """Return run-time settings. Their category is the plugin's name."""


@hookspec
def corral_authenticators() -> Iterable[type[Authenticator]]:  # type: ignore[empty-body]
    """Return authenticators, one for each credential format.

    The classes are instantiated like services, with services passed to the constructor.
    """


@hookspec
def corral_gates() -> Iterable[Gate | RateLimiter]:  # type: ignore[empty-body]
    """Return gates and rate limiters. A gate checks every request before its route is looked up."""


@hookspec
def corral_health_checks() -> Iterable[HealthCheck]:  # type: ignore[empty-body]
    """Return health checks of dependencies. Their results are shown at `/settings/health`.

    A check accesses services through the plugin, which obtains them in `start` with `runtime.service`.
    """


@hookspec
def corral_metrics() -> Iterable[Metric]:  # type: ignore[empty-body]
    """Return metrics that are read at scrape time. Each label has a bounded set of values."""


@hookspec
def corral_commands() -> Iterable[click.Command]:  # type: ignore[empty-body]
    """Return subcommands of `corral`. This hook is called without a kernel, and only for enabled plugins."""


@hookspec
def corral_hookspecs() -> Iterable[Any]:  # type: ignore[empty-body]
    """Return modules that contain the hook specifications that this plugin offers to other plugins."""


@hookspec(firstresult=True)
def corral_blob_store(url: str) -> BlobStore | None:
    """Return the blob store for a storage URL, or None if the plugin does not support this URL."""


@hookspec(firstresult=True)
def corral_bus(url: str) -> Bus | None:
    """Return the notification bus for a Redis URL, or None if the plugin does not support this URL."""


@hookspec(firstresult=True)
def corral_job_queue(url: str) -> SharedJobQueue | None:
    """Return the shared job queue for a Redis URL, or None if the plugin does not support this URL."""
