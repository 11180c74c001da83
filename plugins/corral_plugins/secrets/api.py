"""The public API of the vault for other plugins: the `Secrets` service, the error codes and the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from corral.auth.principal import Principal
from corral.database.model import ADMIN
from corral.errors import declare_codes
from corral.events.event import Event

declare_codes(
    {
        "secret_expired": (
            410,
            "The secret has expired",
            "Give the secret a new value and a new expiry date with `corral api POST /secrets/ID/rotate`.",
        ),
        "secrets.destroyed": (
            410,
            "The value was destroyed",
            "This version no longer exists. Store the value again as a new version.",
        ),
        "secrets.damaged": (
            409,
            "The stored value cannot be decrypted",
            "The stored value was modified outside Corral. Store the value again, and find the cause of the "
            "modification.",
        ),
    }
)


class AttachedObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object that belongs to a plugin and to which a secret can be attached.

    When an admin attaches a secret to the object, the object's plugin is added to the secret's allowed consumers.
    """

    plugin: str
    kind: str
    id: str

    @property
    def consumer_name(self) -> str:
        """The name of the consumer in `allowed_consumers`: the plugin that uses the secret, such as `plugin:llm`."""
        return f"plugin:{self.plugin}"


class SecretDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A secret value for a worker. The worker may send it only to `allowed_hosts`."""

    value: str
    allowed_hosts: list[str]

    def __repr__(self) -> str:  # hides the value, because a repr can end up in logs
        return "<Delivery>"


class Secrets(Protocol):
    """Gives plugins access to the values of secrets. All methods run in the caller's unit of work.

    Callers must request a value each time they need it, and must never store it. Methods raise `NotFound` if the secret
    does not exist, `Forbidden` if the secret must not be used by the consumer or sent to the host, `Gone`
    (`secret_expired`) if the secret has expired, and `Unavailable` (`vault_sealed`) while the vault is sealed.
    """

    def use_value(
        self, name: str, consumer: str | Sequence[str], host: str | None, *, attached: AttachedObject | None = None
    ) -> str:
        """Return the value of a secret that the caller is going to send to `host`.

        At least one of the consumers (such as `tool:http.fetch`) must be allowed to use the secret.
        """
        ...

    def valid_values(self, name: str, *, attached: AttachedObject) -> list[str]:
        """Return all currently valid values of a secret, for verifying incoming signatures.

        These are the current value, and earlier values whose grace period has not ended.
        """
        ...

    def deliver_to_worker(
        self, name: str, worker_group: str, *, worker_id: str, task_id: str, purpose: str | None
    ) -> SecretDelivery:
        """Return the value of a secret for a worker in an allowed group, and record the delivery in the audit log.

        Raise `NotFound` if the group is not allowed to receive the secret.
        """
        ...

    def names_for_group(self, worker_group: str) -> list[str]:
        """Return the names of the secrets that a worker group may receive.

        The returned list may be up to 2 seconds out of date.
        """
        ...

    def consumers(self, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Return the allowed consumers of each named secret, keyed by secret name.

        Secrets that do not exist or have expired are omitted.
        """
        ...

    def attach(self, name: str, to: AttachedObject, *, title: str, pointer: str, by: Principal | None) -> None:
        """Record that an object now uses the secret `name` instead of the secret that it used before.

        Raise `Invalid` (`unknown_reference`) at `pointer` if there is no secret with this name. Raise `Forbidden`
        (`insufficient_scope`) if `by` lacks the `secrets.write` permission. The permission is required because a user
        who decides where an object sends its secret could read the value at that destination. Pass None for `by` if the
        value was submitted with the object and stored by `store_value`.
        """
        ...

    def detach(self, attached: AttachedObject) -> None:
        """Record that the object no longer uses any secret."""
        ...

    def store_value(self, name: str, value: str, *, category: str, description: str, by: Principal) -> list[str]:
        """Store a value that was submitted with an object, and return warnings about the value.

        If a secret with this name exists, the value becomes its new version.
        """
        ...

    def name_of(self, secret_id: str) -> str | None:
        """Return the name of the secret with this id, or None if there is none."""
        ...

    def id_of(self, name: str) -> str | None:
        """Return the id of the secret with this name, or None if there is none."""
        ...

    def delete_value(self, secret_id: str, *, by: Principal) -> None:
        """Delete a secret that `store_value` created for an object that is itself being deleted.

        The caller must detach the object first. Does nothing if the secret has already been deleted.
        """
        ...


class _SecretEvent(Event, kw_only=True):
    """The fields of every event about a secret. `by` is the id of the acting user, or null if Corral itself acted."""

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
    """The value of a secret was replaced."""

    event = "secret.rotated"
    visibility = ADMIN


class SecretRevealed(_SecretEvent):
    """The value of a secret was shown to a user."""

    event = "secret.revealed"
    visibility = ADMIN


class SecretDeleted(_SecretEvent):
    """A secret was deleted. It can be restored during the retention period."""

    event = "secret.deleted"
    visibility = ADMIN


class SecretExpiring(_SecretEvent):
    """A secret will expire soon, or has expired if `days_left` is 0."""

    event = "secret.expiring"
    visibility = ADMIN

    days_left: int | UnsetType = UNSET


EVENTS = (SecretCreated, SecretUpdated, SecretRotated, SecretRevealed, SecretDeleted, SecretExpiring)
