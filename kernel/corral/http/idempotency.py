"""`Idempotency-Key`: the response is stored in the transaction of the effect, so there are never two."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.crypto import Keyring
from corral.database.model import InstantField, JSONField, Model
from corral.database.sealed import SealedField
from corral.errors import Conflict, Invalid

KEEP_SECONDS = 24 * 3600
IN_FLIGHT_SECONDS = 30  # renewed while the process lives
RENEW_SECONDS = 10
BODY = "idempotency"


class IdempotencyRow(Model):
    """A request with a key. `state`: in_flight | done. `until`: when the row expires."""

    key = peewee.CharField(primary_key=True, max_length=64)
    body_hash = peewee.CharField(max_length=64)  # keyed: with a plain hash, readers of the table could guess passwords
    status = peewee.IntegerField(null=True)
    headers = JSONField(null=True)
    body = SealedField(null=True)  # if `sealed`, the whole response
    sealed = peewee.BooleanField(default=False)
    state = peewee.CharField(max_length=12)
    until = InstantField(index=True)
    created_at = InstantField()

    class Meta:
        table_name = "kernel_idempotency"


class Stored(msgspec.Struct, frozen=True):
    """A response to be replayed."""

    status: int
    headers: dict[str, str]
    body: bytes
    asked: bytes = b""  # the hash of the request body, if sealed: here it outlives a change of the master key


class Keyed(msgspec.Struct, frozen=True):
    """A request with a key. The scope of a key is the caller, the method and the path."""

    key: str
    digest: bytes  # of the request body

    @classmethod
    def of(cls, key: str, caller: str, method: str, path: str, body: bytes) -> Keyed:
        """Hash the scope and the body."""
        if not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
            raise Invalid.at("/header/Idempotency-Key", "bad_format", "Use 1 to 255 printable ASCII characters.")
        scope = "\0".join((caller, method, path.rstrip("/"), key))
        return cls(hashlib.sha256(scope.encode()).hexdigest(), hashlib.sha256(body).digest())


class Idempotency:
    """Looks up and stores responses. Every method joins the current unit."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def find(self, keyed: Keyed) -> Stored | None:
        """The stored response, if there is one. Raises `idempotency_key_reused` or `idempotency_in_progress`."""
        row = IdempotencyRow.get_or_none((IdempotencyRow.key == keyed.key) & (IdempotencyRow.until > clock.now()))
        if row is None:
            return None
        aad, text = f"kernel_idempotency|{row.key}|body", row.body or ""
        stored = Stored(row.status or 200, row.headers or {}, text.encode())
        if row.sealed:
            stored = msgspec.msgpack.decode(self._keyring.open(bytes.fromhex(text), aad=aad), type=Stored)
        if stored.asked != keyed.digest and not self._keyring.verify(BODY, keyed.digest, bytes.fromhex(row.body_hash)):
            raise Invalid.at(
                "/header/Idempotency-Key",
                "not_unique",
                "This key was used with another body; choose a new key.",
                problem="idempotency_key_reused",
            )
        if row.state != "done":
            raise Conflict(code="idempotency_in_progress", headers={"Retry-After": "1"})
        return stored

    def begin(self, keyed: Keyed) -> Stored | None:
        """The stored response, or None if the key now belongs to this request. A concurrent request with the same key
        waits for the end of this unit.
        """
        stored, expired = self.find(keyed), IdempotencyRow.until <= clock.now()
        if stored is None and not self._insert(keyed, expired, "in_flight", IN_FLIGHT_SECONDS):
            stored = self.find(keyed)
        return stored

    def finish(self, keyed: Keyed, stored: Stored, *, secret: bool) -> None:
        """Store the response. `secret` encrypts all of it: the body or a cookie may contain a credential."""
        if secret:
            whole = msgspec.msgpack.encode(msgspec.structs.replace(stored, asked=keyed.digest))
            whole = self._keyring.seal(whole, aad=f"kernel_idempotency|{keyed.key}|body")
            done: dict[str, Any] = {"status": None, "headers": None, "body": whole.hex(), "sealed": True}
        else:
            done = {"status": stored.status, "headers": stored.headers, "body": stored.body.decode(), "sealed": False}
        self._insert(keyed, IdempotencyRow.state == "in_flight", "done", KEEP_SECONDS, **done)

    def renew(self, keyed: Keyed) -> None:
        """Extend the life of a key whose handler is still running."""
        IdempotencyRow.update(until=clock.now(IN_FLIGHT_SECONDS)).where(
            (IdempotencyRow.key == keyed.key) & (IdempotencyRow.state == "in_flight")
        ).execute()

    def forget(self, keyed: Keyed) -> None:
        """Release the key after the handler failed."""
        IdempotencyRow.delete().where(
            (IdempotencyRow.key == keyed.key) & (IdempotencyRow.state == "in_flight")
        ).execute()

    def _insert(self, keyed: Keyed, replacing: Any, state: str, seconds: float, **values: Any) -> bool:
        """Write the row, over an existing one only where `replacing` holds. Returns whether it was written."""
        body_hash = self._keyring.mac(BODY, keyed.digest).hex()
        row = {"body_hash": body_hash, "state": state, "until": clock.now(seconds), "created_at": clock.now(), **values}
        insert = IdempotencyRow.insert(key=keyed.key, **row)
        insert = insert.on_conflict(conflict_target=[IdempotencyRow.key], update=row, where=replacing)
        return bool(insert.as_rowcount().execute())


def prune(at_once: int = 500) -> int:
    """Delete expired rows, at most `at_once`. Returns how many."""
    old = IdempotencyRow.select(IdempotencyRow.key).where(IdempotencyRow.until <= clock.now()).limit(at_once)
    return int(IdempotencyRow.delete().where(IdempotencyRow.key.in_(old)).execute())
