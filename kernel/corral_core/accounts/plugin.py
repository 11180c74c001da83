"""The manifest and the hook implementations of the `accounts` plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.auth.principal import Authenticator
from corral.database.engine import Work
from corral.database.model import Model
from corral.events.event import Event
from corral.http.routes import Routes
from corral.jobs.job import Job, Schedule
from corral.plugin import (
    FirstAccount,
    InstallationConfig,
    MailProbe,
    Metric,
    Plugin,
    Provide,
    Runtime,
    Setting,
    hookimpl,
)
from corral_core.accounts.api import (
    EVENTS,
    AccountRecovery,
    Accounts,
    AllSessions,
    Invitations,
    Mail,
    PasswordLinks,
    Tickets,
)
from corral_core.accounts.jobs import JOBS, SCHEDULES
from corral_core.accounts.metrics import METRICS
from corral_core.accounts.models import TABLES
from corral_core.accounts.routes import auth, pages, registration, second_factor, sessions
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.after_restore import AccountsAfterRestore
from corral_core.accounts.service.authentication import (
    AccessTokenAuthenticator,
    AccessTokens,
    SessionPrincipals,
    SigningKeys,
    TicketsService,
)
from corral_core.accounts.service.first_account import FirstAccountSetup
from corral_core.accounts.service.invitations import InvitationsService
from corral_core.accounts.service.links import SingleUseLinks
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.own_account import OwnSecondFactor, ProfileChanges
from corral_core.accounts.service.passwords import PasswordHistory, PasswordPolicy, Passwords
from corral_core.accounts.service.recovery import AccountRecoveryService, PasswordLinksService, PasswordRecovery
from corral_core.accounts.service.registration import AccountRegistration
from corral_core.accounts.service.second_factor import SecondFactor
from corral_core.accounts.service.sessions import AllSessionsService, Sessions
from corral_core.accounts.service.sign_in import SignIn
from corral_core.accounts.service.sign_out import SignOut
from corral_core.accounts.settings import SETTINGS
from corral_core.backup.api import RestoreStep

if TYPE_CHECKING:
    import click


class AccountsPlugin(Plugin):
    """Accounts: user accounts, sign-in, sessions, second factors, invitations and mail."""

    name = "accounts"
    wants = ("backup", "security")
    protected = "essential"
    prefixes = ("general", "mail", "password", "security")

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(AccountsAfterRestore, AccountsAfterRestore),
            Provide(Passwords, Passwords),
            Provide(PasswordPolicy, PasswordPolicy),
            Provide(PasswordHistory, PasswordHistory),
            Provide(AccessTokens, AccessTokens),
            Provide(SigningKeys, SigningKeys),
            Provide(SessionPrincipals, SessionPrincipals),
            Provide(Sessions, Sessions),
            Provide(AllSessions, AllSessionsService),
            Provide(AccountsService, AccountsService),
            Provide(Accounts, _provide_accounts),
            Provide(Tickets, TicketsService),
            Provide(Lockout, Lockout),
            Provide(SecondFactor, SecondFactor),
            Provide(SignIn, SignIn),
            Provide(SignOut, SignOut),
            Provide(OwnSecondFactor, OwnSecondFactor),
            Provide(AccountRecovery, AccountRecoveryService),
            Provide(SingleUseLinks, SingleUseLinks),
            Provide(MailService, MailService),
            Provide(Mail, _provide_mail),
            Provide(MailProbe, _provide_mail_probe),
            Provide(InvitationsService, InvitationsService),
            Provide(Invitations, _provide_invitations),
            Provide(FirstAccountSetup, FirstAccountSetup),
            Provide(FirstAccount, _provide_first_account),
            Provide(AccountRegistration, AccountRegistration),
            Provide(PasswordRecovery, PasswordRecovery),
            Provide(PasswordLinks, PasswordLinksService),
            Provide(ProfileChanges, ProfileChanges),
        ]

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [auth.routes, second_factor.routes, sessions.routes, registration.routes, pages.routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return TABLES

    @hookimpl
    def corral_events(self) -> Iterable[type[Event]]:
        return EVENTS

    @hookimpl
    def corral_settings(self) -> Iterable[Setting[Any]]:
        return SETTINGS

    @hookimpl
    def corral_authenticators(self) -> Iterable[type[Authenticator]]:
        return [AccessTokenAuthenticator]

    @hookimpl
    def corral_commands(self) -> Iterable[click.Command]:
        from corral_core.accounts import commands, session_commands

        return [
            commands.user_command_group,
            commands.crypto_key_command_group,
            session_commands.login_command,
            session_commands.logout_command,
            session_commands.whoami_command,
        ]

    @hookimpl
    def corral_jobs(self) -> Iterable[Job]:
        return JOBS

    @hookimpl
    def corral_schedules(self) -> Iterable[Schedule]:
        return SCHEDULES

    @hookimpl(optionalhook=True)
    def corral_restore_steps(self) -> Iterable[type[RestoreStep]]:
        return [AccountsAfterRestore]

    @hookimpl
    def corral_metrics(self) -> Iterable[Metric]:
        return METRICS

    async def start(self, runtime: Runtime) -> None:
        """Create or read the keys that sign access tokens, and create the admin that environment variables define."""
        work, signing_keys = runtime.service(Work), runtime.service(SigningKeys)
        await work(runtime.service(AccessTokens).create_first_key)
        await signing_keys.register_with_redactor()
        runtime.supervise("signing_keys", signing_keys.register_new_keys)
        links = runtime.service(SingleUseLinks)
        runtime.when_serving(lambda address: _set_server_address(links, address))
        admin = runtime.service(InstallationConfig).bootstrap_admin
        if admin is not None:
            await runtime.service(AccountRegistration).create_bootstrap_admin(*admin)


async def _set_server_address(links: SingleUseLinks, address: str) -> None:
    links.set_server_address(address)


def _provide_accounts(accounts: AccountsService) -> Accounts:
    return accounts


def _provide_mail(mail: MailService) -> Mail:
    return mail


def _provide_mail_probe(mail: MailService) -> MailProbe:
    return mail


def _provide_first_account(first: FirstAccountSetup) -> FirstAccount:
    return first


def _provide_invitations(invitations: InvitationsService) -> Invitations:
    return invitations
