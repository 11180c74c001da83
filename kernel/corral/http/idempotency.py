"""Support for the `Idempotency-Key` header.

The response is stored in the same transaction as the effect of the request, so a repeated request has no second effect.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.crypto import Keyring
from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField
from corral.database.statement import Statement
from corral.database.unit import locked
from corral.errors import Conflict, Invalid
from corral.http.answers import Response

KEEP_SECONDS = 24 * 3600
TASK_KEEP_SECONDS = 400 * 24 * 3600  # until the task ends, and at most this long
IN_FLIGHT_SECONDS = 30  # extended regularly while an `async def` handler runs
RENEW_SECONDS = 10
BODY = "idempotency"
Whole = tuple[int, dict[str, str], bytes, bytes]  # a response, and the hash of the request body


class IdempotencyRow(Model):
    """A request that was sent with an idempotency key. `state` is `in_flight` or `done`. The row expires at `until`.

    If a request was sent on behalf of a task, its response is kept until `KEEP_SECONDS` after the task ends.
    """

    key = peewee.CharField(primary_key=True, max_length=64)
    body_hash = peewee.CharField(max_length=64)  # a MAC: from a plain hash, readers of the table could guess passwords
    status = peewee.IntegerField(null=True)
    headers = JSONField(null=True)
    body = SealedField(null=True)  # the whole response if `sealed`
    sealed = peewee.BooleanField(default=False)
    state = peewee.CharField(max_length=12)
    until = InstantField(index=True)
    created_at = InstantField()
    task_id = IdField(null=True, index=True)

    class Meta:
        table_name = "kernel_idempotency"


class IdempotencyKey(msgspec.Struct, frozen=True):
    """The identity of a request: its idempotency key, together with its caller, method, path and body."""

    scope_hash: str
    body_digest: bytes  # SHA-256 of the request body
    task_id: str | None = None

    @classmethod
    def of_request(
        cls, key: str, caller: str, method: str, path: str, body: bytes, task_id: str | None = None
    ) -> IdempotencyKey:
        """Create the identity of a request with an idempotency key. Raise `Invalid` if the key is malformed."""
        if not (1 <= len(key) <= 255 and key.isascii() and key.isprintable()):
            raise Invalid.at("/header/Idempotency-Key", "bad_format", "Use 1 to 255 printable ASCII characters.")
        scope = "\0".join((caller, method, path.rstrip("/"), key))
        return cls(hashlib.sha256(scope.encode()).hexdigest(), hashlib.sha256(body).digest(), task_id)


class Idempotency:
    """Looks up and stores responses by idempotency key. All methods run in the caller's unit of work."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def claim_key(self, key: IdempotencyKey) -> Response | None:
        """Return the stored response, or claim the key for this request and return None.

        A concurrent request with the same key waits until this unit of work ends. Raise `idempotency_key_reused` if
        the key was used with another body, and `idempotency_in_progress` while the first request is running.
        """
        is_expired = IdempotencyRow.until <= clock.now()
        if self._insert(key, is_expired, "in_flight", IN_FLIGHT_SECONDS, task_id=key.task_id):
            return None
        row = IdempotencyRow.get_or_none(IdempotencyRow.key == key.scope_hash)
        if row is not None:  # otherwise the first request has just failed and released the key
            stored = self._read(key, row)
            if row.state == "done":
                return stored
        raise Conflict(code="idempotency_in_progress", headers={"Retry-After": "1"})

    def _read(self, key: IdempotencyKey, row: Any) -> Response:
        """Return the response stored in a row. Raise `idempotency_key_reused` if it is for another request body."""
        status, headers, body, digest = row.status or 200, row.headers or {}, (row.body or "").encode(), b""
        if row.sealed:
            whole = self._keyring.decrypt(bytes.fromhex(row.body), aad=_aad(key))
            status, headers, body, digest = msgspec.msgpack.decode(whole, type=Whole)
        body_hash = bytes.fromhex(row.body_hash)
        if digest != key.body_digest and not self._keyring.verify(BODY, key.body_digest, body_hash):
            detail = "This key was used with another body; choose a new key."
            raise Invalid.at("/header/Idempotency-Key", "not_unique", detail, problem="idempotency_key_reused")
        media_type = headers.pop("Content-Type", "application/json")
        return Response(status, body, {**headers, "Idempotency-Replayed": "true"}, media_type)

    def store_response(self, key: IdempotencyKey, response: Response, body: bytes, *, secret: bool) -> None:
        """Store a response with its whole body.

        With `secret`, the whole response is encrypted, because the body or a cookie may contain a credential. The
        encrypted data also includes the hash of the request body, because the MAC in the column `body_hash` cannot be
        verified after the master key is rotated.
        """
        headers = {**response.headers, "Content-Type": response.media_type}
        if secret:
            whole: Whole = (response.status, headers, body, key.body_digest)
            sealed = self._keyring.encrypt(msgspec.msgpack.encode(whole), aad=_aad(key))
            done: dict[str, Any] = {"status": None, "headers": None, "body": sealed.hex(), "sealed": True}
        else:
            done = {"status": response.status, "headers": headers, "body": body.decode(), "sealed": False}
        has_task = IdempotencyRow.task_id.is_null(False)  # false after the end of the task
        # locked, because the task may be ending
        is_open = key.task_id is not None and locked(IdempotencyRow.select().where(_in_flight(key) & has_task)).exists()
        seconds = TASK_KEEP_SECONDS if is_open else KEEP_SECONDS
        self._insert(key, IdempotencyRow.state == "in_flight", "done", seconds, **done)

    def renew_key(self, key: IdempotencyKey) -> None:
        """Postpone the expiry of a key while its handler is running."""
        IdempotencyRow.update(until=clock.now(IN_FLIGHT_SECONDS)).where(_in_flight(key)).execute()

    def release_key(self, key: IdempotencyKey) -> None:
        """Release the key, so that the next request with this key runs the handler again."""
        IdempotencyRow.delete().where(_in_flight(key)).execute()

    def _insert(self, key: IdempotencyKey, replacing: Any, state: str, seconds: float, **values: Any) -> bool:
        """Insert the row, or overwrite an existing row that satisfies the condition `replacing`.

        Return whether the row was written.
        """
        body_hash = self._keyring.mac(BODY, key.body_digest).hex()
        row = {"body_hash": body_hash, "state": state, "until": clock.now(seconds), "created_at": clock.now(), **values}
        insert = IdempotencyRow.insert(key=key.scope_hash, **row)
        insert = insert.on_conflict(conflict_target=[IdempotencyRow.key], update=row, where=replacing)
        return bool(insert.as_rowcount().execute())


def _in_flight(key: IdempotencyKey) -> Any:
    return (IdempotencyRow.key == key.scope_hash) & (IdempotencyRow.state == "in_flight")


def _aad(key: IdempotencyKey) -> str:
    return f"kernel_idempotency|{key.scope_hash}|body"


_OF_TASK = Statement(
    lambda p: IdempotencyRow.select(IdempotencyRow.key).where(IdempotencyRow.task_id == p("task_id")).limit(1).tuples()
)


def expire_with_task(task_id: str) -> None:
    """Let the responses to a task's requests expire after `KEEP_SECONDS`, because the task has ended."""
    if _OF_TASK.one({"task_id": task_id}):  # few tasks have any, and an update of no rows takes three times as long
        of_task = IdempotencyRow.task_id == task_id
        IdempotencyRow.update(until=clock.now(KEEP_SECONDS), task_id=None).where(of_task).execute()
