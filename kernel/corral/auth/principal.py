"""Callers and permissions. Permissions are read from the database for each request, never from a token's claims."""

from __future__ import annotations

import functools
import ipaddress
from typing import Protocol, runtime_checkable

import msgspec

from corral import clock
from corral.database.unit import Actor
from corral.errors import Forbidden

ROLES = ("admin", "member", "viewer", "auditor")

PUBLIC = "public"
"""`needs=PUBLIC`: no credential is required."""
SIGNED_IN = "signed_in"
"""`needs=SIGNED_IN`: any signed-in user, regardless of role. Used by self-service routes."""
ANY_CALLER = "any_caller"
"""`needs=ANY_CALLER`: any valid credential, of a person or a machine."""


class Permission(msgspec.Struct, frozen=True):
    """A `<plugin>.<verb>` permission, with the roles and kinds of machine (`worker`, `agent`) that hold it.

    Admins hold every permission that at least one role holds, and every permission without `holders`. They do not hold
    a permission whose holders are all machines.
    """

    name: str
    title: str
    holders: tuple[str, ...] = ()
    step_up: bool = False  # creating an API key with this permission requires a session that has stepped up

    def held_by(self, role_or_kind: str) -> bool:
        """Return whether a user with this role, or a machine of this kind, holds the permission."""
        if role_or_kind == "admin":
            return not self.holders or any(holder in ROLES for holder in self.holders)
        return role_or_kind in self.holders


READERS = ("viewer", "member")
WRITERS = ("member",)


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The authenticated caller of a request.

    `user_id` is the id of the person whose permissions apply. It is None for a registration key and for the system.
    """

    kind: str  # user | api_key | worker | agent | system
    id: str
    user_id: str | None = None
    role: str | None = None
    permissions: frozenset[str] = frozenset()
    session_id: str | None = None
    expires_at: float | None = None  # epoch seconds; the credential is rejected from this time on
    limited: str | None = None  # the problem code that all routes return, except those marked `limited`
    out_of_scope: frozenset[str] = frozenset()  # API keys: permissions of the owner that the key's scopes exclude
    named_scopes: frozenset[str] = frozenset()  # API keys: the scopes that were given by full name
    networks: tuple[str, ...] = ()  # the credential is valid only from these networks; empty: from any address
    reauth_until: float | None = None  # epoch seconds; until then the session has stepped up (password or TOTP again)
    worker_id: str | None = None
    agent_id: str | None = None
    task_id: str | None = None  # attempt tokens: the task of the lease
    lease_id: str | None = None  # attempt tokens: the lease
    token_id: str | None = None  # standing tokens: the row id; API keys: the digest of the key that was sent
    registration_key_id: str | None = None

    def may(self, permission: str) -> bool:
        """Return whether the caller holds the permission."""
        return permission in self.permissions

    @property
    def has_stepped_up(self) -> bool:
        """Whether the person has recently re-authenticated (`POST /auth/reauth`)."""
        return self.reauth_until is not None and self.reauth_until > clock.time_s()

    def check_address(self, client_ip: str) -> None:
        """Raise `Forbidden(ip_blocked)` if the caller's credential must not be used from this address."""
        if self.networks and not is_in_networks(client_ip, self.networks):
            raise Forbidden("This credential may not be used from your address.", code="ip_blocked")

    @property
    def actor(self) -> Actor:
        """The actor that is recorded in rows and events."""
        person = self.user_id if self.user_id != self.id else None
        key = self.id if self.kind == "api_key" else self.registration_key_id
        return Actor(self.kind, self.id, person, self.session_id, key)

    @property
    def is_admin(self) -> bool:
        """Whether the caller is a person with the role `admin`. False for a machine that acts for an admin."""
        return self.role == "admin" and self.kind in ("user", "api_key")


SYSTEM_PRINCIPAL = Principal(kind="system", id="system", role="admin")


class Authenticator(Protocol):
    """Turns a credential into a principal.

    A credential is checked by only one authenticator: the first one whose `recognises` returns true.
    """

    def recognises(self, credential: str) -> bool:
        """Return whether the credential has this authenticator's format.

        Checks only the prefix, without a database query.
        """
        ...

    def authenticate(self, credential: str) -> Principal:
        """Return the principal that the credential identifies, or raise `Unauthorized`.

        Runs in a read-only unit of work; the result is cached for 1 s.
        """
        ...


@runtime_checkable
class RecheckingAuthenticator(Protocol):
    """An authenticator that can also re-check a caller when the original credential is no longer available."""

    def reread(self, caller: Principal) -> Principal | None:
        """Return the caller's current principal, or None if the caller signed in through another authenticator.

        Runs in a read-only unit of work. Raise `Unauthorized` if the caller lost access.
        """
        ...


@runtime_checkable
class Delegation(Protocol):
    """An authenticator that lets a caller act as another principal, which the caller names in a request header."""

    delegation_header: str

    def act_as(self, caller: Principal, named: str) -> Principal:
        """Return the principal that the header names, or `caller` itself if this kind of caller cannot use the header.

        `named` is the value of the delegation header. Runs in a read-only unit of work. Raises a `Problem` when the
        caller may not act as that principal.
        """
        ...


@functools.lru_cache(maxsize=4096)
def is_in_networks(address: str, networks: tuple[str, ...]) -> bool:
    """Return whether an IP address in canonical form, or "" for a Unix socket, lies in one of the networks."""
    return bool(address) and any(ipaddress.ip_address(address) in ipaddress.ip_network(each) for each in networks)


def require_owner(caller: Principal, owner_id: str | None, *, what: str, manage: str | None = None) -> None:
    """Raise `Forbidden` (403) unless the caller owns the object, is an admin or the system, or holds `manage`.

    `manage` is the name of a permission, and `what` is the noun for the error message.
    """
    if caller.is_admin or caller.kind == "system" or (manage is not None and caller.may(manage)):
        return
    if owner_id is None or caller.user_id != owner_id or caller.kind not in ("user", "api_key"):
        raise Forbidden(f"Only the owner of this {what} and admins may perform this operation.")
