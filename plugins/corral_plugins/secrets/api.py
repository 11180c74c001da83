"""What other plugins may know of secrets: the service `Secrets` and the events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.principal import Principal
from corral.database.model import ADMIN
from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "secret_expired": (410, "The secret has expired"),
        "secrets.destroyed": (410, "The value was destroyed"),
        "secrets.damaged": (409, "The stored value does not open"),
    }
)


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """An object of a plugin to which an admin attached a secret: the plugin counts as listed for it."""

    plugin: str
    kind: str
    id: str

    @property
    def consumer(self) -> str:
        """The plugin, as consumers are written."""
        return f"plugin:{self.plugin}"


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A value for a worker, which keeps it to these hosts."""

    value: str
    allowed_hosts: list[str]

    def __repr__(self) -> str:  # it holds a secret, and a repr ends up in logs
        return "<Delivery>"


class Secrets(Protocol):
    """Values for those who send them. Everything joins the caller's unit.

    A value is asked for at the moment of use and never kept. Raises `NotFound`, `Forbidden` (consumer or host are not
    listed), `Gone` (`secret_expired`), `Unavailable` (`vault_sealed`).
    """

    def use(
        self, name: str, consumer: str | Sequence[str], host: str | None, *, attached: Attached | None = None
    ) -> str:
        """The value, to be sent to `host`. `consumer`: `tool:http.fetch`, say; of several one must be listed."""
        ...

    def valid(self, name: str, *, attached: Attached) -> list[str]:
        """The value and those in grace, for checks that Corral makes itself (signatures that come in)."""
        ...

    def deliver(self, name: str, worker_group: str, *, worker_id: str, task_id: str, purpose: str | None) -> Delivery:
        """The value for a worker of a listed group, written into the audit log; `NotFound` for any other."""
        ...

    def of_group(self, worker_group: str) -> list[str]:
        """Names of the secrets that workers of the group may have, as this process knows them (2 s at most)."""
        ...

    def attach(self, name: str, to: Attached, *, title: str, pointer: str, by: Principal | None) -> None:
        """Note that an object uses the secret, in place of the one it used. `unknown_reference` at `pointer`.

        Whoever decides where an object sends its secret could read it there: `by`, who names the secret, needs
        `secrets.write` (`insufficient_scope`). None: the value came with the object, by `keep`.
        """
        ...

    def detach(self, attached: Attached) -> None:
        """The object uses no secret any more."""
        ...

    def keep(self, name: str, value: str, *, category: str, description: str, by: Principal) -> list[str]:
        """Store a value that came with an object of a plugin, as a new version where there is one; the warnings."""
        ...


class _SecretEvent(Event, kw_only=True):
    """What every event of a secret tells. `by`: who did it; null: Corral."""

    secret_id: str
    name: str
    version: int
    by: str | None


class SecretCreated(_SecretEvent):
    """A secret was created."""

    event = "secret.created"
    visibility = ADMIN


class SecretUpdated(_SecretEvent):
    """A secret was changed or restored."""

    event = "secret.updated"
    visibility = ADMIN


class SecretRotated(_SecretEvent):
    """A secret has a new value."""

    event = "secret.rotated"
    visibility = ADMIN


class SecretRevealed(_SecretEvent):
    """A value was shown to a person."""

    event = "secret.revealed"
    visibility = ADMIN


class SecretDeleted(_SecretEvent):
    """A secret was deleted; it can be restored for a while."""

    event = "secret.deleted"
    visibility = ADMIN


class SecretExpiring(_SecretEvent):
    """A secret expires soon; `days_left` 0: it has expired."""

    event = "secret.expiring"
    visibility = ADMIN

    days_left: int | UnsetType = UNSET


EVENTS = (SecretCreated, SecretUpdated, SecretRotated, SecretRevealed, SecretDeleted, SecretExpiring)
