"""The manifest and the hook implementations of the `audit` plugin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import click

from corral import clock
from corral.auth.principal import Permission
from corral.database.model import Model
from corral.errors import Problem
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.metrics.histogram import Observed
from corral.plugin import Audit, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_core.backup.api import RestoreStep
from corral_plugins.audit import api, command, jobs, models, settings
from corral_plugins.audit.routes import routes
from corral_plugins.audit.service import checkpoints
from corral_plugins.audit.service.checkpoints import CheckpointSigner
from corral_plugins.audit.service.log import AccessRecorder, AuditLog
from corral_plugins.audit.service.queries import AuditQueries
from corral_plugins.audit.service.retention import AuditRetention
from corral_plugins.audit.service.verify import Verification
from corral_plugins.audit.shapes import Outcome

WRITE_SECONDS = 5
AUDITOR = ("auditor",)


class AuditPlugin(Plugin):
    """The audit log.

    A complete, tamper-evident record of every security-relevant action, with its actor, object, IP address and outcome.
    """

    name = "audit"
    wants = ("backup",)
    protected = "essential"
    permissions = (
        Permission("audit.read", "Read and verify the audit log", holders=AUDITOR),
        Permission("audit.export", "Export the audit log", holders=AUDITOR),
    )

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._log: AuditLog | None = None

    async def start(self, runtime: Runtime) -> None:
        self._log = log = runtime.service(AuditLog)

        async def write_repetitions() -> None:
            while True:
                await asyncio.sleep(WRITE_SECONDS)
                await log.write_repetitions()
                with contextlib.suppress(Problem):  # while the database is unreachable; retried in the next round
                    await log.report_failures()

        runtime.supervise("repetitions", write_repetitions)

    async def stop(self) -> None:
        if self._log is not None:
            await self._log.write_repetitions(all=True)

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        def audit(log: AuditLog) -> Audit:
            return log

        parts = (AuditLog, AccessRecorder, CheckpointSigner, AuditQueries, AuditRetention, Verification)
        return [*(Provide(part, part) for part in parts), Provide(Audit, audit)]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return models.TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return api.EVENTS

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
    def corral_commands(self) -> Iterable[click.Command]:
        return [command.audit_command]

    @hookimpl(optionalhook=True)
    def corral_restore_steps(self) -> Iterable[type[RestoreStep]]:
        return [Verification]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_audit_rows_total",
                help="Number of rows written to the audit log, by outcome.",
                kind="counter",
                labels={"outcome": get_args(Outcome)},
                collect=_rows_by_outcome,
            ),
            Metric(
                name="corral_audit_write_failures_total",
                help="Number of audit log rows that could not be written.",
                kind="counter",
                collect=_failed_rows,
            ),
            Metric(
                name="corral_audit_append_seconds",
                help="Time to append a row to the audit log, in seconds.",
                kind="histogram",
                collect=_append_seconds,
            ),
            Metric(
                name="corral_audit_last_checkpoint_age_seconds",
                help="Age of the newest checkpoint of the audit log, in seconds.",
                collect=_checkpoint_age,
            ),
        ]


Samples = Mapping[tuple[str, ...], float]


def _rows_by_outcome(log: AuditLog) -> Samples:
    return {(outcome,): float(count) for outcome, count in log.rows.items()}


def _failed_rows(log: AuditLog) -> Samples:
    return {(): float(log.failures)}


def _append_seconds(log: AuditLog) -> Mapping[tuple[str, ...], Observed]:
    return log.append_seconds.read()


def _checkpoint_age() -> Samples:
    newest = checkpoints.newest_checkpoint()
    return {} if newest is None else {(): clock.time_s() - clock.parse_instant(newest[1])}
