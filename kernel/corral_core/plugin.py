"""The map of the kernel's own plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Authenticator
from corral.auth.visibility import EventRights
from corral.config.model import Config
from corral.database.engine import Database, Work
from corral.database.leases import Lease
from corral.database.model import Model
from corral.errors import Conflict
from corral.events.bus import Bus
from corral.events.consumers import ConsumerRow
from corral.events.event import Event, SystemAlert, emit
from corral.events.feed import Feed
from corral.events.log import EventRow
from corral.http.idempotency import IdempotencyRow
from corral.http.routes import Routes
from corral.jobs.job import Job, JobRow, Schedule, ScheduleRow
from corral.jobs.queue import JobQueue
from corral.plugin import Contributions, HealthCheck, Metric, Plugin, Provide, Runtime, Setting, hookimpl
from corral_core.accounts.api import Accounts, AllSessions, Invitations, Mail, NewUser, PasswordLinks, Rescue, Tickets
from corral_core.accounts.events import EVENTS
from corral_core.accounts.jobs import SCHEDULES
from corral_core.accounts.metrics import METRICS as SIGN_IN_METRICS
from corral_core.accounts.models import TABLES as ACCOUNT_TABLES
from corral_core.accounts.routes import auth, second_factor, sessions
from corral_core.accounts.routes import registration as links
from corral_core.accounts.service import mail, recovery, registration
from corral_core.accounts.service.access_tokens import AccessTokens
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.admin_recovery import RescueService
from corral_core.accounts.service.all_sessions import AllSessionsService
from corral_core.accounts.service.authentication import AccessTokenAuthenticator, SessionPrincipals
from corral_core.accounts.service.invitations import InvitationsService
from corral_core.accounts.service.links import Links
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.password_history import PasswordLife
from corral_core.accounts.service.password_policy import PasswordPolicy
from corral_core.accounts.service.passwords import Passwords
from corral_core.accounts.service.profile import Profile
from corral_core.accounts.service.reauthentication import Protection
from corral_core.accounts.service.recovery import PasswordLinksService, Recovery
from corral_core.accounts.service.registration import Registrations
from corral_core.accounts.service.second_factor import SecondFactor
from corral_core.accounts.service.sessions import Sessions
from corral_core.accounts.service.sign_in import SignIn
from corral_core.accounts.service.signing_keys import SigningKeys
from corral_core.accounts.service.tickets import TicketsService
from corral_core.accounts.settings import PERMISSIONS, SETTINGS
from corral_core.event_log import routes as events
from corral_core.event_log.jobs import SCHEDULES as RETENTION
from corral_core.event_log.jobs import lags
from corral_core.event_log.service import EventRightsService
from corral_core.health.models import HealthRow
from corral_core.health.routes import egress, health
from corral_core.health.service.alerts import SCHEDULE as WATCH_HEALTH
from corral_core.health.service.board import HealthBoard
from corral_core.health.service.checks import KernelChecks
from corral_core.health.service.egress_metrics import METRICS
from corral_core.health.service.egress_refusals import RefusedConnections
from corral_core.health.service.heap_trimming import Memory
from corral_core.health.service.process_metrics import LoopLag, ProcessFigures
from corral_core.health.service.readiness import Readiness
from corral_core.health.service.scrape import Scrape
from corral_core.health.service.sibling_processes import Siblings
from corral_core.health.service.single_machine import MachineLease
from corral_core.plugin_admin.events import PluginState
from corral_core.plugin_admin.models import PluginStateRow, QuarantineRow
from corral_core.plugin_admin.routes import docs, plugins
from corral_core.plugin_admin.service.plugins import PluginCatalogue
from corral_core.plugin_admin.service.quarantine import Quarantine
from corral_core.redis.api import SharedBuckets
from corral_core.redis.service.buckets import RedisBuckets
from corral_core.redis.service.bus import RedisBus
from corral_core.redis.service.queue import RqQueue

if TYPE_CHECKING:
    import click

log = logging.getLogger("corral.core")

REDIS = ("redis://", "rediss://", "unix://")


class CorePlugin(Plugin):
    """Core: accounts and sign-in, health and metrics, plugins, and the event log.

    The kernel's own plugin, found by its entry point like any other. It owns the kernel's tables.
    """

    name = "core"
    protected = True
    permissions = PERMISSIONS

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._unwatch: list[Callable[[], None]] = []
        self._bus: RedisBus | None = None
        self._siblings: Siblings | None = None
        self._consumers: list[str] = []

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
            Provide(EventRightsService, EventRightsService),
            Provide(RefusedConnections, RefusedConnections),
            Provide(EventRights, _event_rights),
            Provide(AllSessions, AllSessionsService),
            Provide(SharedBuckets, RedisBuckets),
            Provide(PasswordLife, PasswordLife),
            Provide(Lockout, Lockout),
            Provide(SecondFactor, SecondFactor),
            Provide(SignIn, SignIn),
            Provide(Protection, Protection),
            Provide(RescueService, RescueService),
            Provide(Rescue, _rescue),
            Provide(SigningKeys, SigningKeys),
            Provide(Links, Links),
            Provide(MailService, MailService),
            Provide(Mail, _mail),
            Provide(InvitationsService, InvitationsService),
            Provide(Invitations, _invitations),
            Provide(Registrations, Registrations),
            Provide(Recovery, Recovery),
            Provide(PasswordLinks, PasswordLinksService),
            Provide(Profile, Profile),
            Provide(PluginCatalogue, PluginCatalogue),
            Provide(Quarantine, Quarantine),
            Provide(Readiness, Readiness),
            Provide(Siblings, Siblings),
            Provide(LoopLag, LoopLag),
            Provide(Memory, Memory),
            Provide(ProcessFigures, ProcessFigures),
            Provide(Scrape, Scrape),
            Provide(KernelChecks, KernelChecks),
            Provide(HealthBoard, HealthBoard),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [
            auth.routes,
            second_factor.routes,
            sessions.routes,
            links.routes,
            docs.routes,
            health.routes,
            health.settings_routes,
            plugins.routes,
            events.routes,
            egress.routes,
        ]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [
            *ACCOUNT_TABLES,
            PluginStateRow,
            QuarantineRow,
            EventRow,
            ConsumerRow,
            JobRow,
            ScheduleRow,
            Lease,
            IdempotencyRow,
            HealthRow,
        ]

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return [*EVENTS, PluginState, SystemAlert]

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [AccessTokenAuthenticator]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_core.accounts import commands, keys_command

        return [commands.command, keys_command.command]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return [*mail.JOBS, *recovery.JOBS, *registration.JOBS]

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return [*SCHEDULES, *RETENTION, WATCH_HEALTH]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        lag = Metric(
            name="corral_event_consumer_lag",
            help="Events that a consumer has not seen yet.",
            labels={"consumer": self._consumers},
            collect=lags,
        )
        return [*SIGN_IN_METRICS, *METRICS, lag]

    @hookimpl
    def corral_health_checks(self) -> Iterable[HealthCheck]:
        return [HealthCheck("redis", self._redis_health)]

    def _redis_health(self) -> tuple[str, str]:
        return ("disabled", "Not configured.") if self._bus is None else self._bus.health()

    @hookimpl
    def corral_bus(self, url: str) -> Bus | None:
        self._bus = RedisBus(url) if url.startswith(REDIS) else None
        return self._bus

    @hookimpl
    def corral_job_queue(self, url: str) -> JobQueue | None:
        return RqQueue(url) if url.startswith(REDIS) else None

    async def start(self, runtime: Runtime) -> None:
        """Keys, the bootstrap admin, and what admins have taken out of service."""
        work = runtime.service(Work)
        if runtime.service(Database).is_file:
            machine = MachineLease(work)
            await machine.take()
            runtime.supervise("machine", machine.keep)
        catalogue = runtime.service(PluginCatalogue)
        await work(runtime.service(AccessTokens).prepare)
        signing_keys = runtime.service(SigningKeys)
        await signing_keys.tell()
        runtime.supervise("signing_keys", signing_keys.follow)
        await _bootstrap(runtime.service(Config), work, runtime.service(AccountsService), runtime.service(Passwords))
        if runtime.service(Config).safe_mode:
            await work(_tell_of_safe_mode)
        catalogue.apply(await work(catalogue.stored, read=True))
        quarantine, feed = runtime.service(Quarantine), runtime.service(Feed)
        quarantine.apply(await work(quarantine.stored, read=True))
        runtime.supervise("quarantine", quarantine.keep)
        self._unwatch = [feed.watch(catalogue.follow), feed.watch(quarantine.follow)]
        runtime.supervise("refused_connections", runtime.service(RefusedConnections).follow)
        runtime.supervise("loop_lag", runtime.service(LoopLag).follow)
        runtime.supervise("memory", runtime.service(Memory).follow)
        self._consumers[:] = [item.name for _, item in runtime.service(Contributions).of("corral_subscribers")]
        readiness = runtime.service(Readiness)

        async def drain() -> None:
            readiness.accepting = False

        runtime.when_draining(drain)
        scrape, siblings = runtime.service(Scrape), runtime.service(Siblings)
        self._siblings = siblings
        runtime.when_serving(lambda address: siblings.join(address, scrape.own))

    async def stop(self) -> None:
        for unwatch in self._unwatch:
            unwatch()
        if self._siblings is not None:
            await self._siblings.leave()


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


def _tell_of_safe_mode() -> None:
    alert = SystemAlert(
        kind="safe_mode",
        severity="critical",
        title="Safe mode: only protected plugins are loaded",
        detail="Three starts ended too early, or CORRAL_SAFE_MODE is set. Repair or disable the culprit, then restart.",
    )
    emit(alert, object=("plugin", "core"))


def _event_rights(service: EventRightsService) -> EventRights:
    return service


def _accounts(accounts: AccountsService) -> Accounts:
    return accounts


def _rescue(rescue: RescueService) -> Rescue:
    return rescue


def _mail(mail: MailService) -> Mail:
    return mail


def _invitations(invitations: InvitationsService) -> Invitations:
    return invitations
