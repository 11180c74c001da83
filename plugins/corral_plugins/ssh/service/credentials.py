"""The credentials of connections, which are stored in the vault and read for each login."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.crypto import refuse_mask
from corral.errors import Conflict, Invalid
from corral_plugins.secrets.api import AttachedObject, Secrets
from corral_plugins.ssh.models import Connection
from corral_plugins.ssh.service.submitted_keys import check_private_key
from corral_plugins.ssh.shapes import ConnectionPatch, NewConnection

Body = NewConnection | ConnectionPatch
Part = Literal["credential", "passphrase"]
COLUMNS: dict[Part, tuple[str, str]] = {
    "credential": ("secret_id", "owns_secret"),
    "passphrase": ("passphrase_secret_id", "owns_passphrase"),
}


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """A password, or a private key with its passphrase."""

    value: str
    passphrase: str | None = None

    def __repr__(self) -> str:  # hides the values, because a repr can end up in logs
        return "<Credential>"


class ConnectionCredentials:
    """Stores and reads the credentials of connections. All methods except `check` run in the caller's unit of work."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets

    async def check(self, body: Body, auth_method: str) -> None:
        """Raise `Invalid` if the credential in a request body does not suit `auth_method` or is not valid."""
        given = {field: value for field in _FIELDS if isinstance(value := getattr(body, field), str)}
        for field in ("password", "private_key", "passphrase"):
            refuse_mask(given.get(field), f"/{field}")
        unfit: list[str]
        if auth_method == "password":
            unfit = [field for field in ("private_key", "passphrase", "passphrase_secret_id") if field in given]
        else:
            unfit = ["password"] if "password" in given else []
        for field in unfit:
            raise Invalid.at(
                f"/{field}", "not_allowed", f"This field cannot be combined with auth_method {auth_method}."
            )
        submitted = "password" if auth_method == "password" else "private_key"
        for field, secret in ((submitted, "secret_id"), ("passphrase", "passphrase_secret_id")):
            if field in given and secret in given:
                raise Invalid.at(f"/{field}", "not_allowed", f"Send either {field} or {secret}, not both.")
        if "private_key" in given and "passphrase_secret_id" not in given:
            await check_private_key(given["private_key"], given.get("passphrase"))

    def store(self, row: Connection, body: Body, by: Principal) -> dict[str, Any]:
        """Store a submitted credential, or attach the vault secret that the request body specifies.

        Return the columns of the connection that change.
        """
        submitted = body.password if isinstance(body.password, str) else body.private_key
        columns = self._store_part(row, "credential", submitted, body.secret_id, by)
        passphrase, passphrase_id = body.passphrase, body.passphrase_secret_id
        if isinstance(submitted, str) and not isinstance(passphrase, str) and not isinstance(passphrase_id, str):
            passphrase_id = None  # the passphrase of the earlier key does not fit the new one
        return columns | self._store_part(row, "passphrase", passphrase, passphrase_id, by)

    def read(self, row: Connection) -> Credential:
        """Return the credential of a connection.

        Raise `Conflict` if there is no credential. Errors of the `Secrets` service are passed on.
        """
        if row.secret_id is None:
            raise Conflict(
                "The connection has no credential yet; add a private key or a password to it.",
                current_status="no_credential",
            )
        value = self._read_part(row, "credential", row.secret_id)
        passphrase = row.passphrase_secret_id
        return Credential(
            value=value, passphrase=None if passphrase is None else self._read_part(row, "passphrase", passphrase)
        )

    def remove_secrets(self, row: Connection, by: Principal) -> dict[str, Any]:
        """Detach the secrets of a connection, and delete the secrets that were submitted with it.

        Return the columns of the connection that change.
        """
        changed: dict[str, Any] = {}
        for part in COLUMNS:
            changed |= self._forget_part(row, part, by)
        return changed

    def _store_part(self, row: Connection, part: Part, value: Any, secret_id: Any, by: Principal) -> dict[str, Any]:
        column, owned = COLUMNS[part]
        if isinstance(value, str):
            name = f"ssh.{row.id}.{part}"
            if getattr(row, column) is not None and not getattr(row, owned):
                self._forget_part(row, part, by)
            description = f"The {part} of the SSH connection {row.name}."
            self._secrets.store_value(name, value, category="ssh_key", description=description, by=by)
            self._secrets.attach(name, _attached_object(row, part), title=row.name, pointer=f"/{column}", by=None)
            return {column: self._secrets.id_of(name), owned: True}
        if secret_id is UNSET or secret_id == getattr(row, column):
            return {}
        changed = self._forget_part(row, part, by)
        if secret_id is None:
            return changed
        name = self._secrets.name_of(secret_id) or ""
        self._secrets.attach(name, _attached_object(row, part), title=row.name, pointer=f"/{column}", by=by)
        return {column: secret_id, owned: False}

    def _forget_part(self, row: Connection, part: Part, by: Principal) -> dict[str, Any]:
        column, owned = COLUMNS[part]
        secret_id = getattr(row, column)
        if secret_id is None:
            return {}
        self._secrets.detach(_attached_object(row, part))
        if getattr(row, owned):
            self._secrets.delete_value(secret_id, by=by)
        return {column: None, owned: False}

    def _read_part(self, row: Connection, part: Part, secret_id: str) -> str:
        attached = _attached_object(row, part)
        name = self._secrets.name_of(secret_id)
        if name is None:
            raise Conflict(
                "The secret that contains the connection's credential no longer exists; set the credential again.",
                current_status="no_credential",
            )
        return self._secrets.use_value(name, attached.consumer_name, row.hostname, attached=attached)


_FIELDS = ("secret_id", "passphrase_secret_id", "password", "private_key", "passphrase")


def _attached_object(row: Connection, part: Part) -> AttachedObject:
    return AttachedObject(plugin="ssh", kind=f"connection.{part}", id=row.id)
