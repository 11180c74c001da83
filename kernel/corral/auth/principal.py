"""Callers and permissions. Authority is read per request from rows, never from a token's claims."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import msgspec

from corral import clock
from corral.database.unit import Actor
from corral.errors import Forbidden

ROLES = ("admin", "member", "viewer", "auditor")

PUBLIC = "public"
"""`needs=PUBLIC`: no credential is asked for."""
SIGNED_IN = "signed_in"
"""`needs=SIGNED_IN`: any user, whatever the role; self-service."""
ANY_CALLER = "any_caller"
"""`needs=ANY_CALLER`: any valid credential, of people and machines."""


class Permission(msgspec.Struct, frozen=True):
    """A right `<plugin>.<verb>` and the roles and kinds of caller (`worker`, `agent`) that hold it.

    Admins hold every permission that any role may hold; one whose holders are machines only is theirs alone.
    """

    name: str
    title: str
    holders: tuple[str, ...] = ()
    step_up: bool = False  # an API key that names it is made in a session that has stepped up

    def held_by(self, role_or_kind: str) -> bool:
        """Whether a user of this role, or a machine of this kind, holds it."""
        if role_or_kind == "admin":
            return not self.holders or any(holder in ROLES for holder in self.holders)
        return role_or_kind in self.holders


READERS = ("viewer", "member")
WRITERS = ("member",)


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The caller, as its credential says. `user_id` is the person whose rights count (None: registration key,
    system).
    """

    kind: str  # user | api_key | worker | agent | system
    id: str
    user_id: str | None = None
    role: str | None = None
    permissions: frozenset[str] = frozenset()
    session_id: str | None = None
    expires_at: float | None = None  # epoch seconds; the credential is refused from then on
    limited: str | None = None  # the problem code that every route but a few answers
    beyond: frozenset[str] = frozenset()  # API keys: what the owner may do, but the key's scopes leave out
    named: frozenset[str] = frozenset()  # API keys: the scopes that were named in full
    networks: tuple[str, ...] = ()  # the credential counts only from these; none: from everywhere
    reauth_until: float | None = None  # epoch seconds; until then the session has stepped up (password or TOTP again)
    worker_id: str | None = None
    agent_id: str | None = None
    task_id: str | None = None  # attempt tokens: the task of the lease
    lease_id: str | None = None  # attempt tokens: the lease
    token_id: str | None = None  # standing tokens: the row; API keys: the digest of the text that was sent
    registration_key_id: str | None = None

    def may(self, permission: str) -> bool:
        """Whether the caller holds the permission."""
        return permission in self.permissions

    @property
    def has_stepped_up(self) -> bool:
        """Whether the person proved again, a short time ago, who they are (`POST /auth/reauth`)."""
        return self.reauth_until is not None and self.reauth_until > clock.time_s()

    def check_address(self, client_ip: str) -> None:
        """Raise `Forbidden(ip_blocked)` where the credential may not be used from this address."""
        if self.networks and not within(client_ip, self.networks):
            raise Forbidden("This credential may not be used from your address.", code="ip_blocked")

    @property
    def actor(self) -> Actor:
        """Who is written into rows and events."""
        person = self.user_id if self.user_id != self.id else None
        key = self.id if self.kind == "api_key" else self.registration_key_id
        return Actor(self.kind, self.id, person, self.session_id, key)

    @property
    def is_admin(self) -> bool:
        """A person with role admin, not a machine acting for one."""
        return self.role == "admin" and self.kind in ("user", "api_key")


SYSTEM_PRINCIPAL = Principal(kind="system", id="system", role="admin")


class Authenticator(Protocol):
    """Turns a credential into a principal. The first whose `recognises` is true answers; there is no second chance."""

    def recognises(self, credential: str) -> bool:
        """Whether the credential has this authenticator's form (a prefix; no look-up)."""
        ...

    def authenticate(self, credential: str) -> Principal:
        """The caller; raises `Unauthorized`. Runs in a read unit; the answer is good for at most 1 s."""
        ...


@runtime_checkable
class Rereading(Protocol):
    """An authenticator that also knows what has become of a caller whose credential is not at hand any more."""

    def reread(self, caller: Principal) -> Principal | None:
        """The caller as it is now; None: it is of another authenticator. Raises `Unauthorized`; runs in a read unit."""
        ...


@runtime_checkable
class Delegation(Protocol):
    """An authenticator that lets callers act as another principal, which they name in a request header."""

    delegation_header: str

    def act_as(self, caller: Principal, named: str) -> Principal:
        """The principal that the header's value names, or `caller` itself if such callers do not delegate.

        Runs in a read unit. Raises a `Problem` when the caller may not act as that principal.
        """
        ...


@functools.lru_cache(maxsize=4096)
def within(address: str, networks: tuple[str, ...]) -> bool:
    """Whether an address (as the client-IP function gives it) lies in one of the networks."""
    return bool(address) and any(ipaddress.ip_address(address) in ipaddress.ip_network(each) for each in networks)


def holds(permissions: Iterable[Permission], role_or_kind: str) -> frozenset[str]:
    """The names of the permissions that a role or kind of machine holds."""
    return frozenset(permission.name for permission in permissions if permission.held_by(role_or_kind))


def require_owner(caller: Principal, owner_id: str | None, *, what: str, manage: str | None = None) -> None:
    """Shared objects are written by their owner or an admin (or who holds `manage`); others get 403."""
    if caller.is_admin or caller.kind == "system" or (manage is not None and caller.may(manage)):
        return
    if owner_id is None or caller.user_id != owner_id or caller.kind not in ("user", "api_key"):
        raise Forbidden(f"Only the owner of this {what} or an admin may do this.")
