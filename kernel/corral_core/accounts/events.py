"""Events about accounts, sessions, second factors and invitations."""

from __future__ import annotations

from corral.database.model import PRIVATE_AND_ADMIN
from corral.database.unit import current
from corral.events.event import Event
from corral.schema.fields import Instant


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
    """An account was purged; plugins delete the private objects of its user."""

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


def is_own_change(user_id: str) -> bool:
    """Return whether the actor of the unit of work is the account's own user. An anonymous actor counts as the user."""
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def audit_action(verb: str, user_id: str) -> str:
    """Return the audit action: `auth.user.<verb>` for a change to the user's own account, else `admin.user.<verb>`."""
    return f"{'auth' if is_own_change(user_id) else 'admin'}.user.{verb}"
