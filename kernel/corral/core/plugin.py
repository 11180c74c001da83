"""The map of the kernel's own plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.models import (
    InstallationRow,
    RefreshRow,
    SessionRow,
    SigningKeyRow,
    TicketRow,
    UserRow,
)
from corral.auth.passwords import Passwords
from corral.auth.principal import Authenticator
from corral.auth.tokens import AccessTokens
from corral.config import Config
from corral.core.accounts import AccountsService
from corral.core.api import EVENTS, Accounts, NewUser, Tickets
from corral.core.authenticator import AccessTokenAuthenticator, SessionPrincipals
from corral.core.declarations import PERMISSIONS, SETTINGS
from corral.core.health import Readiness, Scrape
from corral.core.jobs import SCHEDULES
from corral.core.models import PluginStateRow
from corral.core.plugins import PluginCatalogue
from corral.core.policy import PasswordPolicy
from corral.core.profile import Profile
from corral.core.routes import auth, docs, events, health, plugins
from corral.core.sessions import Sessions
from corral.core.sign_in import SignIn
from corral.core.tickets import TicketsService
from corral.database.engine import Work
from corral.database.leases import Lease
from corral.database.model import Model
from corral.errors import Conflict
from corral.events.consumers import ConsumerRow
from corral.events.event import Event, SystemAlert
from corral.events.feed import Feed
from corral.events.log import EventRow
from corral.http.idempotency import IdempotencyRow
from corral.http.routes import Routes
from corral.jobs.job import JobRow, Schedule, ScheduleRow
from corral.plugin import Metric, Plugin, Provide, Runtime, Setting, hookimpl

if TYPE_CHECKING:
    import click

log = logging.getLogger("corral.core")


class CorePlugin(Plugin):
    """Core: accounts and sign-in, health and metrics, plugins, and the event log.

    The kernel's own plugin, found by its entry point like any other. It owns the kernel's tables.
    """

    name = "core"
    protected = True
    permissions = PERMISSIONS

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._unwatch: Callable[[], None] = lambda: None

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(Passwords, Passwords),
            Provide(PasswordPolicy, PasswordPolicy),
            Provide(AccessTokens, AccessTokens),
            Provide(SessionPrincipals, SessionPrincipals),
            Provide(Sessions, Sessions),
            Provide(AccountsService, AccountsService),
            Provide(Accounts, _accounts),
            Provide(Tickets, TicketsService),
            Provide(SignIn, SignIn),
            Provide(Profile, Profile),
            Provide(PluginCatalogue, PluginCatalogue),
            Provide(Readiness, Readiness),
            Provide(Scrape, Scrape),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [auth.routes, docs.routes, health.routes, plugins.routes, events.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [
            UserRow, SessionRow, RefreshRow, TicketRow, SigningKeyRow, InstallationRow, PluginStateRow,
            EventRow, ConsumerRow, JobRow, ScheduleRow, Lease, IdempotencyRow,
        ]  # fmt: skip

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [*EVENTS, SystemAlert]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [AccessTokenAuthenticator]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral.core.commands import command

        return [command]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return SCHEDULES

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return [Metric(name="corral_sessions_active", help="Sessions that go on", collect=_live_sessions)]

    async def start(self, runtime: Runtime) -> None:
        """Keys, the bootstrap admin, and what admins have taken out of service."""
        work = runtime.service(Work)  # type: ignore[type-abstract]  # the key of a service may be a protocol
        catalogue = runtime.service(PluginCatalogue)
        await work(runtime.service(AccessTokens).prepare)
        await _bootstrap(runtime.service(Config), work, runtime.service(AccountsService), runtime.service(Passwords))
        catalogue.apply(await work(catalogue.stored, read=True))
        self._unwatch = runtime.service(Feed).watch(catalogue.follow)
        readiness = runtime.service(Readiness)

        async def drain() -> None:
            readiness.accepting = False

        runtime.when_draining(drain)

    async def stop(self) -> None:
        self._unwatch()


async def _bootstrap(config: Config, work: Work, accounts: AccountsService, passwords: Passwords) -> None:
    """Make the admin whom the environment names, while there is no admin; the policy does not bind the operator."""
    email, password = config.bootstrap_admin_email, config.bootstrap_admin_password
    if not email or not password or await work(accounts.has_admin, read=True):
        return
    hashed = await passwords.hash(password)
    new = NewUser(email=email, full_name="Administrator", role="admin")
    try:
        await work(lambda: accounts.bootstrap(new, hashed))
    except Conflict:
        log.warning("CORRAL_BOOTSTRAP_ADMIN_EMAIL is the address of an account that is no admin; it stays as it is")


def _accounts(accounts: AccountsService) -> Accounts:
    return accounts


def _live_sessions() -> dict[tuple[str, ...], float]:
    return {(): float(SessionRow.select().where(SessionRow.ended_at.is_null()).count())}
