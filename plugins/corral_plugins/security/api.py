"""The public interface of the `security` plugin: the `ApiKeyCounts` service, the error codes and the events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from corral.database.model import ADMIN, PRIVATE
from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "would_lock_out": (
            409,
            "You would lock yourself out",
            "The change would lock you out. Allow your own address, or set up a second factor, or use force if the "
            "operation offers it.",
        )
    }
)


class ApiKeyCounts(Protocol):
    """Counts API keys. Every method runs in the caller's unit of work."""

    def count_active_keys(self, user_ids: Iterable[str]) -> dict[str, int]:
        """Return the number of active keys of each user. Users without active keys are omitted."""
        ...


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
    """An API key will expire soon."""

    event = "api_key.expiring"
    visibility = PRIVATE

    key_id: str
    name: str


EVENTS = (SecurityChanged, IpRulesChanged, ApiKeyCreated, ApiKeyRotated, ApiKeyRevoked, ApiKeyExpiring)
