"""The public interface of `accounts`: users and sessions, mails and links, socket tickets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.principal import Principal
from corral.errors import declare_codes
from corral.http.answers import ANY_VERSION, IfMatch
from corral.http.page import Page, PageQuery
from corral.plugin import Setting
from corral.schema.fields import Instant, line

declare_codes(
    {
        "token_reuse": (401, "The token was used before"),
        "invalid_credentials": (401, "The credentials are wrong"),
        "registration_closed": (403, "Registration is closed"),
        "email_unverified": (403, "The address is not verified"),
        "last_admin": (409, "The last active admin must stay"),
        "plugin_required": (409, "The plugin is required"),
        "link_expired": (410, "The link has expired"),
        "weak_password": (422, "The password breaks the policy"),
        "account_locked": (429, "The account is locked for a while"),
        "core.second_factor_damaged": (409, "The stored second factor does not open"),
    }
)
declare_codes(
    {
        "mfa_required": (403, "A second factor is required"),
        "password_change_required": (403, "The password must be changed first"),
    },
    limiting=True,
)

Role = Literal["admin", "member", "viewer", "auditor"]
Address = Annotated[str, line(254, 3)]
FullName = Annotated[str, line(200)]
Password = Annotated[str, Meta(min_length=1, max_length=128)]
Notice = Literal["locked", "password_changed", "email_changed", "recovery_code_used", "refresh_reuse", "mfa_reset"]
"""The kinds of mail that notify users of changes to their account."""
REGISTRATION = Setting(
    name="security.registration",
    env="CORRAL_REGISTRATION",
    kind=str,
    default="open",
    title="Who may register",
    choices=("open", "invite", "closed"),
)
"""`health` warns where a public installation leaves it open."""


class UserView(msgspec.Struct, kw_only=True):
    """A user account. It never contains a password, a seed or a hash."""

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
    """A new account. Hash the password separately, before the unit (`Accounts.hash_password`)."""

    email: Address
    full_name: FullName
    role: Role = "member"
    must_change_password: bool = False


class UserPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A partial update of an account; absent fields stay unchanged."""

    email: Address | UnsetType = UNSET
    full_name: FullName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    is_active: bool | UnsetType = UNSET
    must_change_password: bool | UnsetType = UNSET
    timezone: str | UnsetType = UNSET
    locale: str | UnsetType = UNSET
    preferences: dict[str, Any] | UnsetType = UNSET


class UserQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of the list of accounts. `search` matches address and name, ignoring case."""

    role: list[Role] = msgspec.field(default_factory=list)
    is_active: bool | UnsetType = UNSET
    search: Annotated[str, line(200, 0)] = ""


class Accounts(Protocol):
    """User accounts. Everything except `hash_password` joins the current unit."""

    async def hash_password(
        self, password: str, *, email: str, full_name: str, pointer: str = "/password", user_id: str | None = None
    ) -> str:
        """Check a new password against the policy (`weak_password`) and hash it; call this before the unit.

        `user_id`: also reject this user's former passwords; pass it only if the caller is authenticated as that user.
        """
        ...

    def create(self, new: NewUser, *, password_hash: str | None, by: Principal, how: str = "admin") -> UserView:
        """Create an active account, without a password if the hash is None. Raises `Conflict(duplicate)`."""
        ...

    def get(self, user_id: str) -> UserView:
        """One account, also a purged one; raises `NotFound`."""
        ...

    def get_many(self, user_ids: Iterable[str]) -> dict[str, UserView]:
        """Accounts by id; unknown ids are left out."""
        ...

    def details(self, user_ids: Iterable[str]) -> dict[str, AccountDetails]:
        """Further details of accounts for admins, by id; unknown ids are left out."""
        ...

    def find(self, email: str) -> UserView | None:
        """The account of an address in any spelling; None if there is none."""
        ...

    def limit(self, user: UserView) -> str | None:
        """The action that this user must take first: the `limited` of every principal with this user's rights."""
        ...

    def list(self, query: UserQuery, caller: Principal) -> Page[UserView]:
        """Accounts, newest first, without purged ones. The route checks permissions."""
        ...

    def count(self) -> dict[tuple[str, bool], int]:
        """The number of accounts by role and whether they are active, without purged ones."""
        ...

    def update(self, user_id: str, patch: UserPatch, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        """Change an account; lost rights end its sessions. Raises `Conflict(last_admin)` for the last active admin."""
        ...

    def set_password(self, user_id: str, password_hash: str, *, must_change: bool = False) -> UserView:
        """Replace the password and end every session of the user."""
        ...

    def end_sessions(self, user_id: str, reason: str, *, keep: str | None = None) -> int:
        """End the user's sessions except `keep`; returns their number."""
        ...

    def purge(self, user_id: str) -> None:
        """Erase a deactivated account and free its address; the row remains as "deleted user"."""
        ...


class Delivery(msgspec.Struct, kw_only=True):
    """The result of a test mail. `error`: the message of the egress guard or the mail server, for admins."""

    delivered: bool
    duration_ms: int
    error: str | None


class Mail(Protocol):
    """Mails to users. They are jobs: an unavailable mail server delays them and nothing else."""

    @property
    def is_configured(self) -> bool:
        """Whether `mail.host` is set."""
        ...

    def notify(self, to: str, kind: Notice, **facts: str | int) -> None:
        """Enqueue a notice to an address; joins the unit. Does nothing without a mail service.

        Facts: `locked` until, `email_changed` new, `recovery_code_used` left.
        """
        ...

    async def check(self) -> tuple[str, str]:
        """Connect to the mail server: a health status and a sentence. For async callers, outside a unit."""
        ...

    async def test(self, to: str) -> Delivery:
        """Send a test mail now; raises `invalid_state` without a mail service. For async handlers, outside a unit."""
        ...


class KeysOfPeople(Protocol):
    """Ends API keys when an account changes; provided by the plugin `security`."""

    def revoke_all(self, user_id: str) -> int:
        """End every key of a user; returns their number. Joins the unit."""
        ...


class PasswordLinks(Protocol):
    """Links by which users set a password. Everything joins the unit."""

    def welcome(self, user_id: str) -> str | None:
        """Mail a link to an account without a password and return None; without a mail service return its URL."""
        ...

    def reset(self, user_id: str) -> str:
        """Delete the password and end all sessions; returns the URL of a link to a new one, which is mailed too."""
        ...


class AccountDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Details of an account that only admins see."""

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
    """Invitations to create an account. Everything joins the unit."""

    def create(self, email: str, role: Role, *, by: Principal) -> tuple[InvitationView, str]:
        """Invite an address, also by mail if possible. Returns the invitation and its URL, to be shown once.

        Raises `Conflict(duplicate)` for an address with an account or a pending invitation.
        """
        ...

    def list(self, query: PageQuery, caller: Principal) -> Page[InvitationView]:
        """Invitations, newest first."""
        ...

    def revoke(self, invitation_id: str) -> None:
        """Revoke a pending invitation and end its links; raises `NotFound`."""
        ...


class OwnerView(msgspec.Struct, kw_only=True):
    """The owner of an object; `email` is empty after the account was purged."""

    id: str
    email: str


class SignedInView(msgspec.Struct, kw_only=True):
    """A session as admins see it. `current`: it made this request."""

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


class SignedInQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of the list of sessions."""

    user_id: Annotated[str, Meta(max_length=36)] | UnsetType = UNSET
    ip: Annotated[str, Meta(max_length=45)] | UnsetType = UNSET


class AllSessions(Protocol):
    """The live sessions of all users. Everything joins the unit."""

    def list(self, query: SignedInQuery, caller: Principal) -> Page[SignedInView]:
        """Live sessions, newest first. The route checks permissions."""
        ...

    def end(self, session_id: str, reason: str) -> None:
        """End a live session; raises `NotFound`."""
        ...


class AccountRecovery(Protocol):
    """Recovery of accounts by admins. Everything joins the unit and raises `NotFound`."""

    def unlock(self, user_id: str) -> UserView:
        """End a lockout after failed sign-ins immediately."""
        ...

    def reset_mfa(self, user_id: str) -> UserView:
        """Disable the second factor of a user who lost it, and end all their sessions."""
        ...

    def failed_attempts(self, emails: Iterable[str]) -> dict[str, int]:
        """The number of failed sign-ins that still count, by address; addresses without one are left out."""
        ...


class Tickets(Protocol):
    """Single-use tickets that authenticate a WebSocket, where no header can be sent. Everything joins the unit."""

    def issue(self, caller: Principal) -> str:
        """Create a ticket that is valid for 30 s."""
        ...

    def reread(self, caller: Principal) -> Principal:
        """The caller of a long-lived connection with its current rights; raises `Unauthorized` if the session ended."""
        ...

    def redeem(self, ticket: str) -> Principal:
        """Consume a ticket; returns its caller with current rights. Raises `Unauthorized` for an invalid ticket."""
        ...
