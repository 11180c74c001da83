"""The `secrets` plugin: its manifest and its hook implementations."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Permission
from corral.crypto import Sealer
from corral.database.engine import Work
from corral.database.model import Model
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem
from corral.events.event import Event
from corral.events.live_feed import Feed
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.redact.redactor import Redactor
from corral_plugins.secrets import jobs, models, settings
from corral_plugins.secrets.api import EVENTS, Secrets
from corral_plugins.secrets.routes import routes
from corral_plugins.secrets.service.access import CONSUMERS, OUTCOMES, SecretsService, UsageTracker, write_last_used
from corral_plugins.secrets.service.alerts import VaultAlerts
from corral_plugins.secrets.service.listing import STATUSES, SecretListing, secrets_by_status
from corral_plugins.secrets.service.master_key_rotation import MasterKeyRotation
from corral_plugins.secrets.service.pinned_secrets import PinnedSecrets
from corral_plugins.secrets.service.redactor_values import RedactorValues
from corral_plugins.secrets.service.values import SecretValues
from corral_plugins.secrets.service.vault import Vault

if TYPE_CHECKING:
    import click

WRITE_SECONDS = 5.0
COUNT_SECONDS = 1.0
ENTRY = UnitContext(label="secrets.last_used", actor=SYSTEM)


class SecretsPlugin(Plugin):
    """The secrets vault.

    The vault encrypts credentials, keeps their earlier versions and audits changes. Consumers refer to credentials by
    name, and Corral redacts credential values from all text.
    """

    name = "secrets"
    requires = ("event_log",)
    protected = True
    permissions = (
        Permission("secrets.read", "List secrets without their values"),
        Permission("secrets.write", "Create, rotate and delete secrets"),
        Permission("secrets.reveal", "Reveal the value of a secret, with a recorded reason", step_up=True),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._usage = UsageTracker()
        self._sealer: Sealer | None = None
        self._redactor_values: RedactorValues | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._remaining_rows: Callable[[], int] = lambda: 0

    async def start(self, runtime: Runtime) -> None:
        """Load the values of all secrets into the redactor before the first request is served."""
        work, alerts, values = runtime.service(Work), runtime.service(VaultAlerts), runtime.service(RedactorValues)
        redactor, self._sealer, self._redactor_values = runtime.service(Redactor), runtime.service(Sealer), values
        keys, loop = runtime.service(MasterKeyRotation), asyncio.get_running_loop()

        def count_rows_to_rewrap() -> int:
            """Count the rows that must be rewrapped. Runs outside the event loop.

            Returns 0 if the database is unreachable, because another health check reports that condition.
            """
            counted = asyncio.run_coroutine_threadsafe(work(keys.remaining_rows, entry=ENTRY, read=True), loop)
            with contextlib.suppress(Problem, TimeoutError):
                return int(counted.result(COUNT_SECONDS))
            counted.cancel()
            return 0

        self._remaining_rows = count_rows_to_rewrap
        redactor.on_hit(alerts.report_leaks)
        self._unwatch = runtime.service(Feed).watch(values.on_events)
        await values.refresh()
        if self._sealer.sealed:
            await work(alerts.report_sealed, entry=ENTRY)

        async def write_usage() -> None:
            while True:
                await asyncio.sleep(WRITE_SECONDS)
                if last := self._usage.take_pending():
                    await work(lambda: write_last_used(last), entry=ENTRY)

        runtime.supervise("secrets.redactor_values", values.run)
        runtime.supervise("secrets.alerts", alerts.publish_regularly)
        runtime.supervise("secrets.last_used", write_usage)

    async def stop(self) -> None:
        self._unwatch()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (PinnedSecrets, VaultAlerts, SecretValues, Vault, SecretListing, RedactorValues, MasterKeyRotation)
        return [
            Provide(UsageTracker, lambda: self._usage),
            *(Provide(part, part) for part in parts),
            Provide(SecretsService, SecretsService),
            Provide(Secrets, _provide_secrets),
        ]

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
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("vault", self._check_vault)]

    def _check_vault(self) -> tuple[str, str]:
        if self._sealer is None or self._redactor_values is None:
            return "down", "The vault has not started yet."
        if self._sealer.sealed:
            return "down", "Sealed: the master key of the stored values is missing or wrong; check CORRAL_MASTER_KEY."
        if self._redactor_values.unreadable:
            return (
                "degraded",
                f"{self._redactor_values.unreadable} stored values cannot be decrypted; run `corral secrets verify`.",
            )
        if remaining := self._remaining_rows():
            return "degraded", (
                f"{remaining} rows are encrypted under an old master key; run `corral secrets rotate-master-key`."
            )
        return "ok", "All stored values can be decrypted."

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_secrets",
                help="Number of secrets by status.",
                labels={"status": STATUSES},
                collect=secrets_by_status,
            ),
            Metric(
                name="corral_secret_uses_total",
                help="Number of uses of secrets, by consumer kind and outcome.",
                kind="counter",
                labels={"consumer": CONSUMERS, "outcome": OUTCOMES},
                collect=self._collect_access_counts,
            ),
            Metric(
                name="corral_vault_sealed", help="1 if no usable master key is loaded, otherwise 0.", collect=_is_sealed
            ),
            Metric(
                name="corral_vault_rewrap_remaining",
                help="Number of rows whose values are not encrypted with the active master key.",
                collect=_collect_remaining_rows,
            ),
        ]

    def _collect_access_counts(self) -> Mapping[tuple[str, ...], float]:
        return {labels: float(count) for labels, count in self._usage.counts.items()}

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.secrets.command import secrets_command

        return [secrets_command]


def _provide_secrets(service: SecretsService) -> Secrets:
    return service


def _is_sealed(sealer: Sealer) -> dict[tuple[str, ...], float]:
    return {(): float(sealer.sealed)}


def _collect_remaining_rows(keys: MasterKeyRotation) -> dict[tuple[str, ...], float]:
    return {(): keys.remaining_rows()}
