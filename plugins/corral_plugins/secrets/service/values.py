"""Values: sealed into versions, opened, generated, destroyed."""

from __future__ import annotations

import secrets
import string
from typing import Any

from corral import clock
from corral.crypto import Keyring, SealedWrong, place, refuse_mask
from corral.errors import Conflict, Invalid, NotFound, Problem, Unavailable
from corral.ids import new_id
from corral.redact.encodings import redactable
from corral_plugins.secrets.models import SecretRow, SecretVersion
from corral_plugins.secrets.service.alarms import Alarms
from corral_plugins.secrets.shapes import Generate

LONGEST = 64 * 1024
NOT_REDACTABLE = "not_redactable"
CHARSETS = {
    "alnum": string.ascii_letters + string.digits,
    "ascii": "".join(map(chr, range(0x21, 0x7F))),
    "hex": "0123456789abcdef",
    "base64url": string.ascii_letters + string.digits + "-_",
}


def checked(value: str, pointer: str = "/value") -> str:
    """A value that may be stored; else `Invalid`."""
    refuse_mask(value, pointer)
    if len(value.encode()) > LONGEST:
        raise Invalid.at(pointer, "too_long", "at most 64 KiB of UTF-8")
    return value


def warnings(value: str | None) -> list[str]:
    """What the caller should know of a value."""
    return [] if value is None or redactable(value) else [NOT_REDACTABLE]


def unhex(text: str) -> bytes:
    """A sealed value as it is stored; `SealedWrong` where somebody cut or altered it so that it is no hex any more."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise SealedWrong("not a sealed value") from None


def _place(secret_id: str, n: int) -> str:
    """By the secret, not by the version's row: who gives that to another secret must not give the value along."""
    return place("secrets_versions", secret_id, n)


def generated(how: Generate) -> str:
    """A new random value."""
    return "".join(secrets.choice(CHARSETS[how.charset]) for _ in range(how.length))


class Values:
    """Joins the caller's unit. The only one that seals and opens values."""

    def __init__(self, keyring: Keyring, alarms: Alarms) -> None:
        self._keyring, self._alarms = keyring, alarms

    def add(self, row: SecretRow, n: int, value: str, *, by: str | None) -> None:
        """Store a value as version `n` of a locked secret."""
        sealed = self._keyring.seal(value.encode(), aad=_place(row.id, n)).hex()
        SecretVersion.create(id=new_id(), secret_id=row.id, n=n, sealed=sealed, created_by=by, created_at=clock.now())

    def replace(self, row: SecretRow, value: str, *, by: str | None, grace_seconds: int = 0) -> int:
        """The next version of a locked secret: its number. The present one stays valid for Corral's own checks."""
        n = row.version + 1
        self.add(row, n, value, by=by)
        if grace_seconds:
            now_old = (SecretVersion.secret_id == row.id) & (SecretVersion.n == row.version)
            SecretVersion.update(grace_until=clock.now(grace_seconds)).where(now_old).execute()
        return n

    def forget_old(self, row: SecretRow) -> None:
        """Delete versions beyond the number that is kept, but for those in grace."""
        over = SecretVersion.grace_until.is_null() | (SecretVersion.grace_until <= clock.now())
        beyond = SecretVersion.n <= row.version - row.max_versions
        SecretVersion.delete().where((SecretVersion.secret_id == row.id) & beyond & over).execute()

    def version(self, row: SecretRow, n: int) -> SecretVersion:
        """A version; `NotFound`."""
        found = SecretVersion.get_or_none((SecretVersion.secret_id == row.id) & (SecretVersion.n == n))
        if found is None:
            raise NotFound("There is no such version of this secret.")
        return found

    def open(self, row: SecretRow, n: int | None = None) -> str:
        """The value of a version (None: the current one). `secrets.destroyed`; `secrets.damaged`, which is reported."""
        version = self.version(row, row.version if n is None else n)
        if version.sealed is None:
            raise Problem("This version was destroyed for ever.", code="secrets.destroyed")
        try:
            return self.opened(version)
        except SealedWrong:
            self._alarms.damaged(row.id, row.name)
            told = f"The stored value of {row.name} was changed, or belongs to another secret; store it anew."
            raise Conflict(told, code="secrets.damaged") from None

    def opened(self, version: SecretVersion) -> str:
        """The text of a sealed version; `SealedWrong`, `Unavailable`."""
        return self._keyring.open(unhex(version.sealed), aad=_place(version.secret_id, version.n)).decode()

    def after(self, id: str, at_once: int = 200) -> list[Any]:
        """The versions after one that were not destroyed, with the names of their secrets."""
        joined = SecretVersion.select(SecretVersion, SecretRow.name.alias("name")).join(
            SecretRow, on=(SecretRow.id == SecretVersion.secret_id)
        )
        where = SecretVersion.sealed.is_null(False) & (SecretVersion.id > id)
        return list(joined.where(where).order_by(SecretVersion.id).limit(at_once).objects())

    def is_damaged(self, version: SecretVersion) -> bool:
        """Whether it does not open where it lies, though its key is here. Needs no unit."""
        try:
            self.opened(version)
        except SealedWrong:
            return True
        except Unavailable:
            return False
        return False

    def destroy(self, row: SecretRow, n: int) -> None:
        """Shred the key and the ciphertext of a version that is not current."""
        if n == row.version:
            raise Conflict(
                "The current value cannot be destroyed; rotate or delete the secret.", current_status="current"
            )
        there = (SecretVersion.id == self.version(row, n).id) & SecretVersion.sealed.is_null(False)
        if not SecretVersion.update(sealed=None, grace_until=None).where(there).execute():
            raise NotFound("This version was destroyed before.")

    def in_grace(self, row: SecretRow) -> list[str]:
        """The values that were replaced and are still valid for Corral's own checks."""
        valid = (SecretVersion.secret_id == row.id) & (SecretVersion.grace_until > clock.now())
        found = SecretVersion.select().where(valid & SecretVersion.sealed.is_null(False))
        return [self.opened(version) for version in found.order_by(SecretVersion.n.desc()).limit(row.max_versions)]
