"""Encrypts, decrypts, generates and destroys the values of secrets."""

from __future__ import annotations

import secrets
import string
from typing import Any

from corral import clock
from corral.crypto import InvalidSealedValue, Sealer, associated_data, refuse_mask
from corral.errors import Conflict, Invalid, NotFound, Problem, Unavailable
from corral.ids import new_id
from corral.redact.encodings import is_redactable
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service.alerts import VaultAlerts
from corral_plugins.secrets.shapes import GenerationOptions

MAX_VALUE_BYTES = 64 * 1024
NOT_REDACTABLE = "not_redactable"
CHARSETS = {
    "alnum": string.ascii_letters + string.digits,
    "ascii": "".join(map(chr, range(0x21, 0x7F))),
    "hex": "0123456789abcdef",
    "base64url": string.ascii_letters + string.digits + "-_",
}


def checked_value(value: str, pointer: str = "/value") -> str:
    """Return the value unchanged if it can be stored. Raise `Invalid` if it is a masked value or larger than 64 KiB."""
    refuse_mask(value, pointer)
    if len(value.encode()) > MAX_VALUE_BYTES:
        raise Invalid.at(pointer, "too_long", "must not exceed 64 KiB when it is encoded as UTF-8")
    return value


def value_warnings(value: str | None) -> list[str]:
    """Return a list with the warning `not_redactable` if the value is too short or too common to be redacted."""
    return [] if value is None or is_redactable(value) else [NOT_REDACTABLE]


def decode_hex(text: str) -> bytes:
    """Decode a stored encrypted value. Raise `InvalidSealedValue` if the text is damaged, that is, not hexadecimal."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidSealedValue("the bytes are not a sealed value") from None


def _value_context(secret_id: str, n: int) -> str:
    """Return the associated data that binds an encrypted value to its secret and version.

    Because of this binding, a version row that is moved to another secret cannot be decrypted.
    """
    return associated_data("secrets_versions", secret_id, n)


def generate_value(how: GenerationOptions) -> str:
    """Generate a random value with the given length and character set."""
    return "".join(secrets.choice(CHARSETS[how.charset]) for _ in range(how.length))


class SecretValues:
    """Encrypts and decrypts secret values. No other class does this. Methods run in the caller's unit of work."""

    def __init__(self, sealer: Sealer, alerts: VaultAlerts) -> None:
        self._sealer, self._alerts = sealer, alerts

    def add_version(self, row: SecretRow, n: int, value: str, *, by: str | None) -> None:
        """Encrypt and store a value as version `n` of a locked secret."""
        sealed = self._sealer.encrypt(value.encode(), aad=_value_context(row.id, n)).hex()
        SecretVersion.create(id=new_id(), secret_id=row.id, n=n, sealed=sealed, created_by=by, created_at=clock.now())

    def add_next_version(self, row: SecretRow, value: str, *, by: str | None, grace_seconds: int = 0) -> int:
        """Add the next version of a locked secret and return its number.

        The previous value stays valid for `grace_seconds` seconds.
        """
        n = row.version + 1
        self.add_version(row, n, value, by=by)
        if grace_seconds:
            now_old = (SecretVersion.secret_id == row.id) & (SecretVersion.n == row.version)
            SecretVersion.update(grace_until=clock.now(grace_seconds)).where(now_old).execute()
        return n

    def delete_old_versions(self, row: SecretRow) -> None:
        """Delete the oldest versions if there are more than `max_versions`. Versions in their grace period are kept."""
        over = SecretVersion.grace_until.is_null() | (SecretVersion.grace_until <= clock.now())
        beyond = SecretVersion.n <= row.version - row.max_versions
        SecretVersion.delete().where((SecretVersion.secret_id == row.id) & beyond & over).execute()

    def get_version(self, row: SecretRow, n: int) -> SecretVersion:
        """Return version `n` of a secret. Raise `NotFound` if this version does not exist."""
        found = SecretVersion.get_or_none((SecretVersion.secret_id == row.id) & (SecretVersion.n == n))
        if found is None:
            raise NotFound("This secret has no version with this number; the version never existed or was removed.")
        return found

    def decrypt(self, row: SecretRow, n: int | None = None) -> str:
        """Decrypt and return the value of a version, by default of the current version.

        Raise a `Problem` (`secrets.destroyed`) if the version was destroyed. If the value is damaged, alert admins and
        raise `Conflict` (`secrets.damaged`).
        """
        version = self.get_version(row, row.version if n is None else n)
        if version.sealed is None:
            raise Problem("This version was destroyed permanently.", code="secrets.destroyed")
        try:
            return self.decrypt_version(version)
        except InvalidSealedValue:
            self._alerts.report_damaged(row.id, row.name)
            detail = f"The stored value of {row.name} is damaged or belongs to another secret; store it again."
            raise Conflict(detail, code="secrets.damaged") from None

    def decrypt_version(self, version: SecretVersion) -> str:
        """Decrypt a version and return its value.

        Raise `InvalidSealedValue` if the value is damaged, and `Unavailable` if its master key is not loaded.
        """
        return self._sealer.decrypt(
            decode_hex(version.sealed), aad=_value_context(version.secret_id, version.n)
        ).decode()

    def versions_after(self, id: str, at_once: int = 200) -> list[Any]:
        """Return the next batch of versions whose id is greater than `id`, with the names of their secrets.

        Destroyed versions are omitted.
        """
        joined = SecretVersion.select(SecretVersion, SecretRow.name.alias("name")).join(
            SecretRow, on=(SecretRow.id == SecretVersion.secret_id)
        )
        where = SecretVersion.sealed.is_null(False) & (SecretVersion.id > id)
        return list(joined.where(where).order_by(SecretVersion.id).limit(at_once).objects())

    def is_damaged(self, version: SecretVersion) -> bool:
        """Return whether a version cannot be decrypted although its key is loaded. Does not require a unit of work."""
        try:
            self.decrypt_version(version)
        except InvalidSealedValue:
            return True
        except Unavailable:
            return False
        return False

    def destroy_version(self, row: SecretRow, n: int) -> None:
        """Delete the encrypted value of a version together with its key.

        Raise `Conflict` if the version is the current version.
        """
        if n == row.version:
            raise Conflict(
                "The current value cannot be destroyed; rotate or delete the secret instead.", current_status="current"
            )
        there = (SecretVersion.id == self.get_version(row, n).id) & SecretVersion.sealed.is_null(False)
        if not SecretVersion.update(sealed=None, grace_until=None).where(there).execute():
            raise NotFound("This version was already destroyed.")

    def values_in_grace(self, row: SecretRow) -> list[str]:
        """Return the replaced values that are still in their grace period, newest first."""
        valid = (SecretVersion.secret_id == row.id) & (SecretVersion.grace_until > clock.now())
        found = SecretVersion.select().where(valid & SecretVersion.sealed.is_null(False))
        return [
            self.decrypt_version(version) for version in found.order_by(SecretVersion.n.desc()).limit(row.max_versions)
        ]
