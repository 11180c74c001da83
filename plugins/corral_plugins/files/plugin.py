"""The `files` plugin: its manifest and its hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import READERS, WRITERS, Permission
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.storage.blobs import BlobStore
from corral_plugins.files import jobs, models, settings
from corral_plugins.files.api import EVENTS, Files
from corral_plugins.files.routes import routes
from corral_plugins.files.service.agent_tools import AgentFiles, FileTools
from corral_plugins.files.service.downloads import Downloads
from corral_plugins.files.service.files import FilesService
from corral_plugins.files.service.links import FileLinks
from corral_plugins.files.service.metrics import FileMetrics
from corral_plugins.files.service.quota import FileQuota
from corral_plugins.files.service.registry import FileRegistry
from corral_plugins.files.service.s3 import SCHEME, S3Blobs
from corral_plugins.files.service.storage import FileStorage
from corral_plugins.files.service.sweeps import FileSweeps
from corral_plugins.files.service.uploads import Uploads
from corral_plugins.tools.api import Tool

if TYPE_CHECKING:
    import click


class FilesPlugin(Plugin):
    """Files, which are the inputs and results of tasks.

    A file is stored either completely and durably, or not at all. Files are stored in a folder, or in an S3 or MinIO
    bucket.
    """

    name = "files"
    requires = ("accounts",)
    wants = ("circuit_breakers", "tasks", "tools")
    permissions = (
        Permission("files.read", "Read one's own files and those shared with a task", holders=(*READERS, "agent")),
        Permission("files.write", "Upload files; change and delete one's own files", holders=(*WRITERS, "agent")),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._metrics = FileMetrics()
        self._storage: FileStorage | None = None
        self._tools = FileTools()

    async def start(self, runtime: Runtime) -> None:
        storage = self._storage = runtime.service(FileStorage)
        self._tools.set_implementation(runtime.service(AgentFiles))
        storage.guard_object_store()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (
            FileStorage,
            FileQuota,
            FileRegistry,
            Uploads,
            Downloads,
            FileLinks,
            FileSweeps,
            AgentFiles,
            FilesService,
        )
        return [
            Provide(FileMetrics, lambda: self._metrics),
            *(Provide(part, part) for part in parts),
            Provide(Files, _provide_files),
        ]

    @hookimpl
    def corral_blob_store(self, url: str) -> BlobStore | None:
        return S3Blobs(url) if url.startswith(SCHEME) else None

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return settings.ALL

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return jobs.JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return jobs.SCHEDULES

    @hookimpl
    def corral_subscribers(self) -> Iterable[Subscriber]:
        return [
            Subscriber("files.people", ("user.purged",), jobs.on_user_purged),
            Subscriber("files.tasks", ("task.deleted",), jobs.on_task_deleted),
        ]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return self._metrics.definitions()

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.files.commands import files_command_group

        return [files_command_group]

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("minio", self._check_object_store)]

    @hookimpl(optionalhook=True)
    def corral_tools(self) -> Iterable[Tool]:
        return self._tools.all()

    def _check_object_store(self) -> tuple[str, str]:
        store = None if self._storage is None else self._storage.object_store
        if store is None:
            return "disabled", "Files are kept in a folder."
        try:
            store.check()
        except Exception as error:
            return "down", f"The bucket {store.bucket} cannot be reached ({type(error).__name__})."
        return "ok", f"The bucket {store.bucket} answers."


def _provide_files(service: FilesService) -> Files:
    return service
