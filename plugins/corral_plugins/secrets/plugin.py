"""The plugin `secrets`: its manifest and what it contributes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Permission
from corral.crypto import Keyring
from corral.database.engine import Work
from corral.database.model import Model
from corral.database.unit import SYSTEM, Entry
from corral.errors import Problem
from corral.events.event import Event
from corral.events.feed import Feed
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral.redact.redactor import Redactor
from corral_plugins.secrets import jobs, models, settings
from corral_plugins.secrets.api import EVENTS, Secrets
from corral_plugins.secrets.routes import routes
from corral_plugins.secrets.service.alarms import Alarms
from corral_plugins.secrets.service.catalogue import Catalogue
from corral_plugins.secrets.service.environment import Environment
from corral_plugins.secrets.service.figures import STATUSES, secrets_by_status
from corral_plugins.secrets.service.keys import MasterKeys
from corral_plugins.secrets.service.known import KnownValues
from corral_plugins.secrets.service.use import CONSUMERS, OUTCOMES, SecretsService, Uses, write_uses
from corral_plugins.secrets.service.values import Values
from corral_plugins.secrets.service.vault import Vault

if TYPE_CHECKING:
    import click

WRITE_USES_SECONDS = 5.0
COUNT_SECONDS = 1.0
ENTRY = Entry(label="secrets.uses", actor=SYSTEM)


class SecretsPlugin(Plugin):
    """The vault: credentials in one place.

    Encrypted, versioned and audited; used by name, shown to nobody by accident, and taken out of every text.
    """

    name = "secrets"
    protected = True
    permissions = (
        Permission("secrets.read", "See which secrets there are, never their values"),
        Permission("secrets.write", "Store, rotate and delete secrets"),
        Permission("secrets.reveal", "Show the value of a secret, for a reason that is kept", step_up=True),
    )

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._uses = Uses()
        self._keyring: Keyring | None = None
        self._known: KnownValues | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._left: Callable[[], int] = lambda: 0

    async def start(self, runtime: Runtime) -> None:
        """Before anything is served, the redactor knows every value."""
        work, alarms, known = runtime.service(Work), runtime.service(Alarms), runtime.service(KnownValues)
        redactor, self._keyring, self._known = runtime.service(Redactor), runtime.service(Keyring), known
        keys, loop = runtime.service(MasterKeys), asyncio.get_running_loop()

        def left() -> int:
            """Asked in a thread. While the database is away nothing is known, which its own check tells."""
            counted = asyncio.run_coroutine_threadsafe(work(keys.remaining, entry=ENTRY, read=True), loop)
            with contextlib.suppress(Problem, TimeoutError):
                return int(counted.result(COUNT_SECONDS))
            counted.cancel()
            return 0

        self._left = left
        redactor.on_hit(alarms.met)
        self._unwatch = runtime.service(Feed).watch(known.follow)
        await known.refresh()
        if self._keyring.sealed:
            await work(alarms.sealed, entry=ENTRY)

        async def keep_uses() -> None:
            while True:
                await asyncio.sleep(WRITE_USES_SECONDS)
                if last := self._uses.take():
                    await work(lambda: write_uses(last), entry=ENTRY)

        runtime.supervise("secrets.known", known.run)
        runtime.supervise("secrets.alarms", alarms.run)
        runtime.supervise("secrets.uses", keep_uses)

    async def stop(self) -> None:
        self._unwatch()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        parts = (Environment, Alarms, Values, Vault, Catalogue, KnownValues, MasterKeys)
        return [
            Provide(Uses, lambda: self._uses),
            *(Provide(part, part) for part in parts),
            Provide(SecretsService, SecretsService),
            Provide(Secrets, _secrets),
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
        return [HealthCheck("vault", self._health)]

    def _health(self) -> tuple[str, str]:
        if self._keyring is None or self._known is None:
            return "down", "Not started."
        if self._keyring.sealed:
            return "down", "Sealed: the master key of the stored values is missing or another one."
        if self._known.unreadable:
            return "degraded", f"{self._known.unreadable} stored values do not open: corral secrets verify."
        if left := self._left():
            return "degraded", f"{left} rows need an old master key: corral secrets rotate-master-key."
        return "ok", "Every stored value opens."

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [
            Metric(
                name="corral_secrets",
                help="Secrets by status.",
                labels={"status": STATUSES},
                collect=secrets_by_status,
            ),
            Metric(
                name="corral_secret_uses_total",
                help="Uses of secrets, by kind of consumer.",
                kind="counter",
                labels={"consumer": CONSUMERS, "outcome": OUTCOMES},
                collect=self._counted,
            ),
            Metric(name="corral_vault_sealed", help="1 while no usable master key is loaded.", collect=_sealed),
            Metric(
                name="corral_vault_rewrap_remaining",
                help="Encrypted rows that are not under the active key.",
                collect=_remaining,
            ),
        ]

    def _counted(self) -> Mapping[tuple[str, ...], float]:
        return {labels: float(count) for labels, count in self._uses.counts.items()}

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_plugins.secrets.command import command

        return [command]


def _secrets(service: SecretsService) -> Secrets:
    return service


def _sealed(keyring: Keyring) -> dict[tuple[str, ...], float]:
    return {(): float(keyring.sealed)}


def _remaining(keys: MasterKeys) -> dict[tuple[str, ...], float]:
    return {(): keys.remaining()}
