"""What other plugins may use of `core`: accounts and sessions, mails and links, socket tickets."""

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
"""The mails that tell somebody what happened to their account."""
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
    """A person's account. It never holds a password, a seed or a hash."""

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
    """An account to be made. The password goes another way: hash it first (`Accounts.hash_password`)."""

    email: Address
    full_name: FullName
    role: Role = "member"
    must_change_password: bool = False


class UserPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What of an account changes; absent fields stay."""

    email: Address | UnsetType = UNSET
    full_name: FullName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    is_active: bool | UnsetType = UNSET
    must_change_password: bool | UnsetType = UNSET
    timezone: str | UnsetType = UNSET
    locale: str | UnsetType = UNSET
    preferences: dict[str, Any] | UnsetType = UNSET


class UserQuery(PageQuery, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Filters of the list of accounts. `search` matches address and name, whatever the case."""

    role: list[Role] = msgspec.field(default_factory=list)
    is_active: bool | UnsetType = UNSET
    search: Annotated[str, line(200, 0)] = ""


class Accounts(Protocol):
    """People. Everything but `hash_password` joins the current unit."""

    async def hash_password(
        self, password: str, *, email: str, full_name: str, pointer: str = "/password", user_id: str | None = None
    ) -> str:
        """Check a new password against the policy (`weak_password`) and hash it; call it before the unit.

        `user_id`: whose former passwords do not come back; give it once the caller is known to be that user.
        """
        ...

    def create(self, new: NewUser, *, password_hash: str | None, by: Principal, how: str = "admin") -> UserView:
        """Make an active account; None: it has no password yet. `Conflict(duplicate)` for a taken address."""
        ...

    def get(self, user_id: str) -> UserView:
        """One account, purged ones too; `NotFound`."""
        ...

    def get_many(self, user_ids: Iterable[str]) -> dict[str, UserView]:
        """Accounts by id; unknown ids are left out."""
        ...

    def details(self, user_ids: Iterable[str]) -> dict[str, AccountDetails]:
        """What else there is to know of accounts, by id; unknown ids are left out."""
        ...

    def find(self, email: str) -> UserView | None:
        """The account of an address, in whatever spelling."""
        ...

    def limit(self, user: UserView) -> str | None:
        """What this person must do first: `limited` of every principal that has this person's rights. None: nothing."""
        ...

    def list(self, query: UserQuery, caller: Principal) -> Page[UserView]:
        """Accounts, newest first, without purged ones. The route decides who may ask."""
        ...

    def count(self) -> dict[tuple[str, bool], int]:
        """How many accounts there are by role and whether they are active, without purged ones."""
        ...

    def update(self, user_id: str, patch: UserPatch, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        """Change an account. `Conflict(last_admin)` rather than leaving no active admin; lost rights end sessions."""
        ...

    def set_password(self, user_id: str, password_hash: str, *, must_change: bool = False) -> UserView:
        """Replace the password and end every session of the user."""
        ...

    def end_sessions(self, user_id: str, reason: str, *, keep: str | None = None) -> int:
        """End the user's sessions but `keep`; how many ended."""
        ...

    def purge(self, user_id: str) -> None:
        """Blank a deactivated account and free its address; the row stays as "deleted user"."""
        ...


class Delivery(msgspec.Struct, kw_only=True):
    """How a mail that was sent at once went. `error`: what the guard or the mail server said, for admins."""

    delivered: bool
    duration_ms: int
    error: str | None


class Mail(Protocol):
    """Mails to people. They are jobs: a mail server that is down delays them and nothing else."""

    @property
    def is_configured(self) -> bool:
        """Whether there is a mail service: `mail.host` is set."""
        ...

    def notify(self, to: str, kind: Notice, **facts: str | int) -> None:
        """Tell the holder of an address; joins the unit and takes effect with it. Without a mail service: nothing.

        Facts: `locked` until, `email_changed` new, `recovery_code_used` left.
        """
        ...

    async def check(self) -> tuple[str, str]:
        """Connect to the mail server: a health status and a sentence. For async callers, outside a unit."""
        ...

    async def test(self, to: str) -> Delivery:
        """Send a test mail now; `invalid_state` without a mail service. For async handlers, outside a unit."""
        ...


class KeysOfPeople(Protocol):
    """API keys, as far as a change of an account ends them; provided by the plugin `security`."""

    def revoke_all(self, user_id: str) -> int:
        """End every key of a user; how many. Joins the unit."""
        ...


class PasswordLinks(Protocol):
    """Links by which people choose a password. Everything joins the unit."""

    def welcome(self, user_id: str) -> str | None:
        """For an account without a password: the link is mailed (None), or it is this URL, to be shown once."""
        ...

    def reset(self, user_id: str) -> str:
        """The old password and all sessions end: the URL of a link to a new one, mailed too where that is possible."""
        ...


class AccountDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What admins see of an account beside the account itself."""

    created_by: str | None
    sessions: int


class InvitationView(msgspec.Struct, kw_only=True):
    """An invitation to make an account."""

    id: str
    email: str
    role: str
    created_by: str | None
    created_at: Instant
    expires_at: Instant
    status: str  # pending | accepted | expired | revoked


class Invitations(Protocol):
    """Invitations to make an account. Everything joins the unit."""

    def create(self, email: str, role: Role, *, by: Principal) -> tuple[InvitationView, str]:
        """Invite an address, by mail too where there is a mail service: the invitation, and its URL, shown this once.

        `Conflict(duplicate)` for an address that has an account or an open invitation.
        """
        ...

    def list(self, query: PageQuery, caller: Principal) -> Page[InvitationView]:
        """Invitations, newest first."""
        ...

    def revoke(self, invitation_id: str) -> None:
        """Its links end at once; `NotFound` unless it is pending."""
        ...


class OwnerView(msgspec.Struct, kw_only=True):
    """Whose something is; `email` is empty once the account is purged."""

    id: str
    email: str


class SignedInView(msgspec.Struct, kw_only=True):
    """A session as admins see it. `current`: the one that asks."""

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
    """The live sessions of everybody. Everything joins the unit."""

    def list(self, query: SignedInQuery, caller: Principal) -> Page[SignedInView]:
        """Live sessions, newest first. The route decides who may ask."""
        ...

    def end(self, session_id: str, reason: str) -> None:
        """End one; `NotFound` unless it goes on."""
        ...


class Rescue(Protocol):
    """What admins do for people who cannot get in any more. Everything joins the unit; `NotFound`."""

    def unlock(self, user_id: str) -> UserView:
        """End a lock after failed sign-ins at once."""
        ...

    def reset_mfa(self, user_id: str) -> UserView:
        """Switch the second factor off for somebody who lost it, and end every session of the user."""
        ...

    def failed_attempts(self, emails: Iterable[str]) -> dict[str, int]:
        """Failed sign-ins that still count, by address; addresses without any are left out."""
        ...


class Tickets(Protocol):
    """Single-use tickets that open a socket where a header cannot be sent. Both join the unit."""

    def issue(self, caller: Principal) -> str:
        """A ticket that is good for 30 s."""
        ...

    def reread(self, caller: Principal) -> Principal:
        """The caller of a long connection as it is now; `Unauthorized` when its session has ended."""
        ...

    def redeem(self, ticket: str) -> Principal:
        """Use the ticket up: the caller as it is now; `Unauthorized` for an unknown, used or old one."""
        ...
