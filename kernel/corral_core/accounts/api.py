"""The public interface of the `accounts` plugin.

It consists of services for accounts, sessions, emails, password links, invitations and WebSocket tickets, and of the
plugin's events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import Principal
from corral.database.model import PRIVATE_AND_ADMIN
from corral.errors import Forbidden, declare_codes
from corral.events.event import Event
from corral.http.answers import ANY_VERSION, IfMatch
from corral.http.page import Page, PageQuery
from corral.plugin import Setting, Settings
from corral.schema.fields import Instant, line

USERS_PATH = "/admin/users"
"""The API path at which commands look up users' email addresses."""

declare_codes(
    {
        "token_reuse": (
            401,
            "The token has already been used",
            "The refresh token was sent twice, which happens when it is copied, and the session has "
            "ended. Sign in again, and change the password if you see this more than once.",
        ),
        "invalid_credentials": (
            401,
            "The credentials are incorrect",
            "Check the email address, the password and the one-time code. After several failures, the address is "
            "locked for some minutes.",
        ),
        "registration_closed": (
            403,
            "Registration is closed",
            "Ask an admin for an invitation (`corral user invite EMAIL`). The first account of a new "
            "installation needs the set-up token that the server prints when it starts.",
        ),
        "email_unverified": (
            403,
            "The email address is not verified",
            "Open the link in the mail that was sent to the address, or request another one with `corral api POST "
            "/auth/verify-email/resend`.",
        ),
        "last_admin": (
            409,
            "At least one active admin is required",
            "Give another active account the role admin first.",
        ),
        "plugin_required": (
            409,
            "The plugin is required",
            "Keep the plugin active, because the installation or other plugins need it. If other plugins require it, "
            "disable those plugins first.",
        ),
        "link_expired": (
            410,
            "The link has expired",
            "Request a new link. A link works once, expires after some time, and becomes invalid when a newer link is "
            "used.",
        ),
        "weak_password": (
            422,
            "The password does not meet the policy",
            "Choose a password that satisfies the rules that errors[] lists.",
        ),
        "account_locked": (
            429,
            "The account is temporarily locked",
            "Wait as long as Retry-After says. An admin can unlock the account immediately with `corral "
            "user unlock EMAIL`.",
        ),
        "core.second_factor_damaged": (
            409,
            "The stored second factor cannot be decrypted",
            "Sign in with a recovery code, or ask an admin to remove the second factor with `corral "
            "user reset-mfa EMAIL`.",
        ),
    }
)
declare_codes(
    {
        "mfa_required": (
            403,
            "A second factor is required",
            "Set up a second factor with `corral api POST /auth/mfa/setup -f password=@-` and `corral api POST "
            "/auth/mfa/verify -f code=@-`; the policy of this installation requires one.",
        ),
        "password_change_required": (
            403,
            "The password must be changed first",
            "Choose a new password with `corral login`.",
        ),
    },
    limiting=True,
)

Role = Literal["admin", "member", "viewer", "auditor"]
Address = Annotated[str, line(254, 3)]
FullName = Annotated[str, line(200)]
Password = Annotated[str, Meta(min_length=1, max_length=128)]
Notice = Literal["locked", "password_changed", "email_changed", "recovery_code_used", "refresh_reuse", "mfa_reset"]
"""The kinds of emails that notify users of changes to their accounts."""
REGISTRATION = Setting(
    name="security.registration",
    env="CORRAL_REGISTRATION",
    kind=str,
    default="invite",
    title="Who may register an account",
    choices=("open", "invite", "closed"),
    description="The first account of an installation can always be registered. If the server listens on more than the "
    "loopback interface, the set-up token that the server prints when it starts is needed to register the first "
    "account.",
)
"""The setting that controls who may register. The `health` plugin warns if registration is open on a public address."""


def _is_zone(value: str, settings: Settings) -> str | None:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return "must be the name of a time zone, such as Europe/Berlin"
    return None


TIMEZONE = Setting(
    name="general.timezone",
    kind=str,
    default="UTC",
    title="Time zone of emails, and of triggers that do not name a time zone",
    check=_is_zone,
    minimum=1,
    maximum=64,
)
"""The time zone used in emails, and by triggers that do not specify a time zone."""


class UserView(msgspec.Struct, kw_only=True):
    """A user account as returned by the API, without the password, the TOTP seed or any hashes."""

    id: str
    email: str
    full_name: str
    role: str
    is_active: bool
    mfa_enabled: bool
    email_verified: bool
    must_change_password: bool
    locked_until: Instant | None
    last_login_at: Instant | None
    timezone: str
    locale: str
    preferences: dict[str, Any]
    created_at: Instant
    updated_at: Instant
    version: int


class NewUser(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The data for a new account, except the password, which is hashed separately (`hash_password`)."""

    email: Address
    full_name: FullName
    role: Role = "member"
    must_change_password: bool = False


class UserPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to an account. Absent fields stay unchanged."""

    email: Address | UnsetType = UNSET
    full_name: FullName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    is_active: bool | UnsetType = UNSET
    must_change_password: bool | UnsetType = UNSET
    timezone: str | UnsetType = UNSET
    locale: str | UnsetType = UNSET
    preferences: dict[str, Any] | UnsetType = UNSET


class UserQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing accounts. `search` matches substrings of the email address and the name, ignoring case."""

    role: list[Role] = msgspec.field(default_factory=list)
    is_active: bool | UnsetType = UNSET
    search: Annotated[str, line(200, 0)] = ""


class InsufficientRights(Forbidden):
    """Raised when the user on whose behalf work runs does not exist, is deactivated, or lacks a required permission."""


class Accounts(Protocol):
    """Manages user accounts. Every function except `hash_password` runs in the caller's unit of work."""

    async def hash_password(
        self, password: str, *, email: str, full_name: str, pointer: str = "/password", user_id: str | None = None
    ) -> str:
        """Check a new password against the policy and hash it. Raise `Invalid` (`weak_password`) if it breaks a rule.

        Call this function before beginning the unit of work that stores the hash. If `user_id` is given, the user's
        previous passwords are rejected too; pass it only if the caller is authenticated as this user.
        """
        ...

    def create(self, new: NewUser, *, password_hash: str | None, by: Principal, how: str = "admin") -> UserView:
        """Create an active account, without a password if `password_hash` is None.

        Raise `Conflict` (`duplicate`) if an account with the same email address exists.
        """
        ...

    def get(self, user_id: str) -> UserView:
        """Return an account, even a purged one. Raise `NotFound` for an unknown id."""
        ...

    def get_many(self, user_ids: Iterable[str]) -> dict[str, UserView]:
        """Return the accounts with these ids, keyed by id. Unknown ids are omitted."""
        ...

    def get_details(self, user_ids: Iterable[str]) -> dict[str, AccountDetails]:
        """Return account details that only admins may see, keyed by account id. Unknown ids are omitted."""
        ...

    def find(self, email: str) -> UserView | None:
        """Return the account with this email address, ignoring case, or None if no account has it."""
        ...

    def ids_by_name(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the ids of the active users that each name identifies, keyed by name.

        A name is an email address, or the part of an address before the `@`. One name may identify several users.
        """
        ...

    def required_action(self, user: UserView) -> str | None:
        """Return the problem code for the action that the user must take first, or None if there is none.

        The result is stored in the `limited` field of each principal that acts with the rights of this user.
        """
        ...

    def principal_of(self, user_id: str | None, *needs: str) -> Principal:
        """Return a principal with the user's current rights.

        Work that continues without a session, such as a task or a workflow run, acts with these rights. Raise
        `InsufficientRights` if the user no longer exists, is deactivated, or lacks one of the permissions in `needs`.
        """
        ...

    def principals_of(self, user_ids: Iterable[str]) -> dict[str, Principal]:
        """Return a principal for each given user who is active, keyed by user id. See `principal_of`."""
        ...

    def list(self, query: UserQuery, caller: Principal) -> Page[UserView]:
        """Return a page of accounts, newest first. Purged accounts are omitted.

        The calling route must check permissions.
        """
        ...

    def count_by_role(self) -> dict[tuple[str, bool], int]:
        """Return the number of accounts, keyed by role and by whether the accounts are active.

        Purged accounts are not counted.
        """
        ...

    def update(self, user_id: str, patch: UserPatch, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        """Change an account. If the change removes rights, end the account's sessions.

        Raise `Conflict` (`last_admin`) if the change would remove the last active admin.
        """
        ...

    def set_password(self, user_id: str, password_hash: str, *, must_change: bool = False) -> UserView:
        """Replace a user's password and end all of the user's sessions."""
        ...

    def end_sessions(self, user_id: str, reason: str, *, keep: str | None = None) -> int:
        """End the user's sessions, except the session with the id `keep`. Return the number of ended sessions."""
        ...

    def purge(self, user_id: str) -> None:
        """Erase the personal data of a deactivated account and free its address.

        The account's row is kept, with the name "deleted user".
        """
        ...


class MailTestResult(msgspec.Struct, kw_only=True):
    """The result of sending a test email. `error` is the error message from the egress guard or the mail server."""

    delivered: bool
    duration_ms: int
    error: str | None


class MailFailed(Exception):
    """Raised when the mail server did not accept an email. Sending it again later may succeed.

    Only admins may see the exception message.
    """


class MailRefused(MailFailed):
    """Raised when the mail server permanently rejected an email because of its recipient or content."""


class PluginEmail(msgspec.Struct, frozen=True, kw_only=True):
    """An email composed by a plugin, as text and as HTML. The installation's name is prepended to the subject."""

    to: str
    subject: str
    text: str
    html: str
    headers: Mapping[str, str] = {}


class Mail(Protocol):
    """Sends emails to users. `notify` only enqueues a job, so an unavailable mail server does not delay the caller."""

    @property
    def is_configured(self) -> bool:
        """Whether a mail server is configured, that is, whether the `mail.host` setting has a value."""
        ...

    def notify(self, to: str, kind: Notice, **facts: str | int) -> None:
        """Enqueue an email of this kind to an address. Runs in the caller's unit of work.

        If no mail server is configured, this function does nothing. `facts` contains the values that the template
        requires: `until` for the kind `locked`, `new` for `email_changed`, and `left` for `recovery_code_used`.
        """
        ...

    async def send_plugin_email(self, email: PluginEmail) -> None:
        """Send an email now.

        Raise `MailFailed` or `MailRefused` if the mail server does not accept it, or `ValueError` for an invalid
        address. Call this function outside a unit of work. If `MailFailed` is raised, the caller must try again
        later.
        """
        ...

    async def check_connection(self) -> tuple[str, str]:
        """Check the connection to the mail server. Return a health status and a sentence that explains it.

        Call this function outside a unit of work.
        """
        ...

    async def send_test_mail(self, to: str) -> MailTestResult:
        """Send a test email now. Raise `Conflict` (`invalid_state`) if no mail server is configured.

        Call this function outside a unit of work.
        """
        ...


class UserApiKeys(Protocol):
    """Revokes the API keys of users when their accounts change. The `security` plugin provides this service."""

    def revoke_keys_of(self, user_id: str) -> int:
        """Revoke all API keys of a user. Return the number of revoked keys. Runs in the caller's unit of work."""
        ...


class PasswordLinks(Protocol):
    """Creates links that let users set a password. Every function runs in the caller's unit of work."""

    def send_welcome_link(self, user_id: str) -> str | None:
        """Create a link that lets a new user set their first password, and email the link to the user.

        Return None if the email was enqueued, otherwise the URL of the link.
        """
        ...

    def create_reset_link(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> str:
        """Delete a user's password and end all of the user's sessions.

        Return the URL of a link for setting a new password. Another link is emailed to the user.
        """
        ...


class AccountDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Account details that only admins may see. `sessions` is the number of live sessions."""

    created_by: str | None
    sessions: int


class InvitationView(msgspec.Struct, kw_only=True):
    """An invitation to create an account."""

    id: str
    email: str
    role: str
    created_by: str | None
    created_at: Instant
    expires_at: Instant
    status: str  # pending | accepted | expired | revoked


class Invitations(Protocol):
    """Manages invitations to create an account. Every function runs in the caller's unit of work."""

    def create(self, email: str, role: Role, *, by: Principal) -> tuple[InvitationView, str]:
        """Create an invitation, and email it if possible. Return the invitation and its URL, which is shown only once.

        Raise `Conflict` (`duplicate`) if the address already has an account or a pending invitation.
        """
        ...

    def list(self, query: PageQuery, caller: Principal) -> Page[InvitationView]:
        """Return a page of invitations, newest first."""
        ...

    def revoke(self, invitation_id: str) -> None:
        """Revoke an invitation and invalidate its links. Raise `NotFound` if no pending invitation has this id."""
        ...


class OwnerView(msgspec.Struct, kw_only=True):
    """The owner of an object. `email` is empty if the account was purged."""

    id: str
    email: str


class UserSessionView(msgspec.Struct, kw_only=True):
    """A session as shown to admins. `current` is true if the request was made in this session."""

    id: str
    user_id: str
    user: OwnerView
    ip: str
    user_agent: str
    mfa: bool
    current: bool
    created_at: Instant
    last_seen_at: Instant
    expires_at: Instant
    reauth_until: Instant | None


class UserSessionQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters for listing sessions."""

    user_id: Annotated[str, Meta(max_length=36)] | UnsetType = UNSET
    ip: Annotated[str, Meta(max_length=45)] | UnsetType = UNSET


class AllSessions(Protocol):
    """Lists and ends the live sessions of all users. Every function runs in the caller's unit of work."""

    def list(self, query: UserSessionQuery, caller: Principal) -> Page[UserSessionView]:
        """Return a page of live sessions, newest first. The calling route must check permissions."""
        ...

    def end(self, session_id: str, reason: str) -> None:
        """End a live session. Raise `NotFound` if no live session has this id."""
        ...


class AccountRecovery(Protocol):
    """Lets admins recover accounts. Every function runs in the caller's unit of work.

    `unlock` and `reset_mfa` raise `NotFound` for an unknown user.
    """

    def unlock(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        """End a lockout that was caused by failed sign-ins."""
        ...

    def reset_mfa(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        """Disable the second factor of a user who has lost it, and end all sessions of the user."""
        ...

    def failed_attempts(self, emails: Iterable[str]) -> dict[str, int]:
        """Return the number of failed sign-ins within the lockout window, keyed by address.

        Addresses without failed sign-ins are omitted.
        """
        ...


class Tickets(Protocol):
    """Single-use tickets that authenticate WebSocket connections.

    Tickets are needed because browsers cannot send an `Authorization` header when they open a WebSocket. Every
    function runs in the caller's unit of work.
    """

    def issue(self, caller: Principal) -> str:
        """Create a ticket for this caller and return its token. The ticket is valid for 30 s."""
        ...

    def reread(self, caller: Principal) -> Principal:
        """Return the caller's principal with its current rights, for use by a long-lived connection.

        Raise `Unauthorized` if the session has ended.
        """
        ...

    def redeem(self, ticket: str) -> Principal:
        """Consume a ticket and return the principal that requested it, with its current rights.

        Raise `Unauthorized` for an invalid ticket.
        """
        ...


class UserCreated(Event, kw_only=True):
    """An account was created."""

    event = "user.created"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str
    role: str
    how: str  # registration | invitation | bootstrap | admin


class UserUpdated(Event, kw_only=True):
    """An account was changed."""

    event = "user.updated"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str
    changed: list[str]


class UserLocked(Event, kw_only=True):
    """An account was locked after too many failed sign-ins."""

    event = "user.locked"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str
    until: Instant


class UserDeactivated(Event, kw_only=True):
    """An account was deactivated."""

    event = "user.deactivated"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str


class UserReactivated(Event, kw_only=True):
    """An account was reactivated."""

    event = "user.reactivated"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str


class UserPurged(Event, kw_only=True):
    """An account was purged. Plugins must delete the user's private objects."""

    event = "user.purged"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str


class InvitationCreated(Event, kw_only=True):
    """An invitation was created."""

    event = "invitation.created"
    visibility = "admin"
    area = "admin"

    invitation_id: str
    role: str


class InvitationAccepted(Event, kw_only=True):
    """An invited person created their account."""

    event = "invitation.accepted"
    visibility = "admin"
    area = "admin"

    invitation_id: str
    role: str


class SessionCreated(Event, kw_only=True):
    """A user signed in and a session was created."""

    event = "session.created"
    visibility = PRIVATE_AND_ADMIN
    area = "security"

    session_id: str
    ip: str


class SessionEnded(Event, kw_only=True):
    """A session ended."""

    event = "session.ended"
    visibility = PRIVATE_AND_ADMIN
    area = "security"

    session_id: str
    reason: str  # logout | revoked | expired | reuse | user_deactivated | password_changed


class MfaEnabled(Event, kw_only=True):
    """A second factor was enabled."""

    event = "mfa.enabled"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str


class MfaDisabled(Event, kw_only=True):
    """A second factor was disabled."""

    event = "mfa.disabled"
    visibility = PRIVATE_AND_ADMIN
    area = "admin"

    user_id: str


EVENTS = (
    InvitationAccepted,
    InvitationCreated,
    UserCreated,
    UserUpdated,
    UserLocked,
    UserDeactivated,
    UserReactivated,
    UserPurged,
    SessionCreated,
    SessionEnded,
    MfaEnabled,
    MfaDisabled,
)
