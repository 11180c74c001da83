"""The events that the plugin `security` publishes."""

from __future__ import annotations

from corral.database.model import ADMIN, PRIVATE
from corral.events.event import Event


class SecurityChanged(Event, kw_only=True):
    """The sign-in policy or the password policy was changed."""

    event = "security.changed"
    visibility = ADMIN

    section: str  # security | password
    changed: list[str]


class IpRulesChanged(Event, kw_only=True):
    """The IP rules were replaced or turned off."""

    event = "ip_rules.changed"
    visibility = ADMIN

    mode: str
    count: int


class ApiKeyCreated(Event, kw_only=True):
    """An API key was created."""

    event = "api_key.created"
    visibility = PRIVATE

    key_id: str
    name: str


class ApiKeyRotated(Event, kw_only=True):
    """An API key was rotated."""

    event = "api_key.rotated"
    visibility = PRIVATE

    key_id: str
    name: str


class ApiKeyRevoked(Event, kw_only=True):
    """An API key was revoked."""

    event = "api_key.revoked"
    visibility = PRIVATE

    key_id: str
    name: str


class ApiKeyExpiring(Event, kw_only=True):
    """An API key expires soon."""

    event = "api_key.expiring"
    visibility = PRIVATE

    key_id: str
    name: str


EVENTS = (SecurityChanged, IpRulesChanged, ApiKeyCreated, ApiKeyRotated, ApiKeyRevoked, ApiKeyExpiring)
