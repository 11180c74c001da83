"""Creates, rotates and revokes API keys, records their last use, and authenticates requests with API keys.

The token of a key is `crl_<id>_<secret><crc>`. The checksum `crc` reveals a mistyped token without a database lookup. A
request with a key has the permissions that the key's scopes include and that its owner currently holds. The last uses
of keys are written in batches, and at most one use per minute is recorded for each key.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import secrets
import string
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.permissions import Permissions, within_scopes
from corral.auth.principal import Principal
from corral.crypto import digest
from corral.database.dialect import advisory_lock
from corral.database.engine import Work
from corral.database.statement import Statement
from corral.database.unit import UnitContext, after_commit
from corral.errors import Conflict, FieldError, Forbidden, Invalid, NotFound, Problem, Unauthorized
from corral.events.event import Event, emit
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry, Settings
from corral_core.accounts.api import Accounts, InsufficientRights, OwnerView
from corral_plugins.security.api import ApiKeyCreated, ApiKeyRevoked, ApiKeyRotated
from corral_plugins.security.models import ApiKeyRow
from corral_plugins.security.service.ip_rules import parse_network
from corral_plugins.security.settings import KEY_DAYS, KEY_MAX_DAYS, KEYS_ENABLED, KEYS_PER_USER
from corral_plugins.security.shapes import IssuedKey, KeyQuery, KeyView, NewKey

log = logging.getLogger("corral.security")

RECORD_SECONDS = 60.0
WRITE_SECONDS = 5.0
BATCH_SIZE = 200


class LastUseRecorder:
    """Collects the last use of each API key in memory. Use this class only on the event loop."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._recorded: dict[str, float] = {}
        self._pending: dict[str, tuple[str, str]] = {}

    def record_use(self, key_id: str, client_ip: str) -> None:
        """Record a use of a key, unless a use of the same key was recorded within the last minute."""
        now = clock.time_s()
        if now - self._recorded.get(key_id, 0.0) >= RECORD_SECONDS:
            self._recorded[key_id] = now
            self._pending[key_id] = clock.format_instant(now), client_ip

    async def write_regularly(self) -> None:
        """Write the collected uses every 5 seconds. Runs as a supervised task."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            try:
                await self.write_pending()
            except Exception:
                log.exception("cannot write the last use of API keys")

    async def write_pending(self) -> None:
        """Write to the database the uses that were recorded since this method was last called."""
        new, self._pending = list(self._pending.items()), {}
        long_ago = clock.time_s() - RECORD_SECONDS
        self._recorded = {key_id: at for key_id, at in self._recorded.items() if at > long_ago}
        for start in range(0, len(new), BATCH_SIZE):
            part = dict(new[start : start + BATCH_SIZE])
            await self._work(lambda part=part: _write_uses(part), entry=UnitContext("security.last_used"))  # type: ignore[misc]  # bound in each iteration


def _write_uses(uses: dict[str, tuple[str, str]]) -> None:
    """Write the last uses of keys. If another process has written a more recent use, it is kept."""
    due = ApiKeyRow.last_used_at.is_null() | (ApiKeyRow.last_used_at < clock.now(-RECORD_SECONDS + WRITE_SECONDS))
    rows = list(ApiKeyRow.select(ApiKeyRow.id).where(ApiKeyRow.id.in_(list(uses)) & due).order_by(ApiKeyRow.id))
    for row in rows:
        row.last_used_at, row.last_used_ip = uses[row.id]
    if rows:
        written: Any = ApiKeyRow  # the type stubs do not annotate bulk_update
        written.bulk_update(rows, fields=[ApiKeyRow.last_used_at, ApiKeyRow.last_used_ip])


# -- keys


PREFIX = "crl_"
ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID, SECRET, CHECK = 8, 43, 6
LENGTH = len(PREFIX) + ID + 1 + SECRET + CHECK
SHOWN = len(PREFIX) + ID
DAY = 86_400
Views = list[KeyView]  # inside the class, `list` is a method


class ApiKeys:
    """Manages API keys. No other class writes to their table, except to record the last use."""

    audit: Audit | None = None

    def __init__(
        self, accounts: Accounts, permissions: Permissions, settings: Settings, credentials: Credentials
    ) -> None:
        self._accounts, self._permissions = accounts, permissions
        self._settings, self._credentials = settings, credentials

    def list(self, query: KeyQuery, *, by: Principal) -> Page[KeyView]:
        """Return a page of the caller's keys, newest first. If `query.all` is set, include all users' keys.

        Expired and revoked keys are included until they are deleted. Raise `Forbidden` if `query.all` is set and the
        caller is not allowed to see the keys of other users.
        """
        if query.all and not by.may("security.read"):
            raise Forbidden("Only admins can list the keys of other users; leave out the parameter `all`.")
        rows = ApiKeyRow.select() if query.all else ApiKeyRow.select().where(ApiKeyRow.user_id == by.user_id)
        if query.status:
            rows = rows.where(reduce(operator.or_, [_has_status(status) for status in query.status]))
        order, scope = newest_first(ApiKeyRow), f"api_keys:{'all' if query.all else by.user_id}"
        page: Page[ApiKeyRow] = paginate(rows, query, by, scope=scope, order=order, make=lambda row: row)
        return Page(
            items=self._key_views(page.items), total=page.total, limit=page.limit, offset=page.offset, next=page.next
        )

    def get(self, key_id: str, *, by: Principal) -> KeyView:
        """Return one of the caller's keys. Raise `NotFound` if the caller has no such key."""
        return self._key_views([_find_key(key_id, ApiKeyRow.user_id == by.user_id)])[0]

    @staticmethod
    def count_active_keys(user_ids: Iterable[str]) -> dict[str, int]:
        """Return the number of active keys of each user. Implements `corral_plugins.security.api.ApiKeyCounts`."""
        mine = ApiKeyRow.user_id.in_([*user_ids]) & _has_status("active")
        rows: Any = ApiKeyRow.select(ApiKeyRow.user_id, peewee.fn.COUNT(ApiKeyRow.id)).where(mine)
        return {user_id: int(number) for user_id, number in rows.group_by(ApiKeyRow.user_id).tuples()}

    def create(self, new: NewKey, *, by: Principal) -> IssuedKey:
        """Create a key.

        Raise `Forbidden` if API keys are disabled or re-authentication is required, `Invalid` for invalid data, or
        `Problem` (`quota_exceeded`) if the caller has too many keys.
        """
        if not self._settings.get(KEYS_ENABLED):
            raise Forbidden("API keys are disabled on this installation.")
        assert by.user_id is not None
        expires_at = self._key_expiry(new)
        self._check_scopes(new.scopes, self._accounts.get(by.user_id).role)
        self._check_step_up(new.scopes, by)
        networks = _parse_networks(new.allowed_cidrs)
        limit, text = self._settings.get(KEYS_PER_USER), new_key()
        advisory_lock(f"security.api_keys {by.user_id}")
        if ApiKeyRow.select().where((ApiKeyRow.user_id == by.user_id) & _has_status("active")).count() >= limit:
            raise Problem(
                f"You already have {limit} active API keys, which is the maximum; revoke one first.",
                code="quota_exceeded",
            )
        row = ApiKeyRow.create(
            id=new_id(),
            user_id=by.user_id,
            name=new.name,
            prefix=text[:SHOWN],
            hash=digest(text),
            scopes=list(dict.fromkeys(new.scopes)),
            allowed_cidrs=networks,
            created_at=clock.now(),
            expires_at=expires_at,
        )
        self._publish_event(ApiKeyCreated(key_id=row.id, name=row.name), "create", row, {"scopes": row.scopes})
        return self._issued_key(row, text)

    def rotate(self, key_id: str, overlap_seconds: int, *, by: Principal) -> IssuedKey:
        """Replace the token of a key. The old token stays valid for `overlap_seconds`.

        Raise `NotFound` if the caller has no such key, or `Conflict` if the key is not active or was rotated in the
        meantime.
        """
        row = _find_key(key_id, ApiKeyRow.user_id == by.user_id)
        self._check_step_up(row.scopes, by)
        text = new_key(row.prefix)
        old = {"old_hash": row.hash, "old_until": clock.now(overlap_seconds)} if overlap_seconds else {"old_hash": None}
        here = (ApiKeyRow.id == key_id) & (ApiKeyRow.hash == row.hash) & _has_status("active")
        if not ApiKeyRow.update(hash=digest(text), **old).where(here).execute():
            status = _key_status(_find_key(key_id, ApiKeyRow.user_id == by.user_id))
            detail = (
                "The key was rotated in the meantime."
                if status == "active"
                else f"The key is {status}; create a new one."
            )
            raise Conflict(detail, current_status=status)
        self._forget_cached_key(key_id)
        row = _find_key(key_id, ApiKeyRow.user_id == by.user_id)
        event = ApiKeyRotated(key_id=key_id, name=row.name)
        self._publish_event(event, "rotate", row, {"overlap_seconds": overlap_seconds})
        return self._issued_key(row, text)

    def _check_step_up(self, scopes: Sequence[str], by: Principal) -> None:
        """Require re-authentication for scopes that a session can use only after re-authentication.

        Without this check, a user could create a key to bypass re-authentication.
        """
        named = [item.name for item in self._permissions.all() if item.step_up and item.name in scopes]
        if named and not by.has_stepped_up:
            detail = f"To issue a key with {named[0]}, re-authenticate first with `corral api POST /auth/reauth`."
            raise Forbidden(detail, code="reauth_required")

    def revoke(self, key_id: str, *, by: Principal) -> None:
        """Revoke one of the caller's keys or, if the caller is an admin, a key of any user.

        Raise `NotFound` if there is no such key or it was already revoked.
        """
        mine = ApiKeyRow.user_id == by.user_id
        which = (ApiKeyRow.id == key_id) & ApiKeyRow.revoked_at.is_null()
        if not self._revoke_where(which if by.may("security.write") else which & mine):
            raise NotFound("There is no API key with this id.")

    def revoke_keys_of(self, user_id: str) -> int:
        """Revoke all keys of a user. Return the number of revoked keys."""
        return self._revoke_where((ApiKeyRow.user_id == user_id) & ApiKeyRow.revoked_at.is_null())

    @staticmethod
    def delete_keys_of(user_id: str) -> None:
        """Delete all keys of a purged user."""
        ApiKeyRow.delete().where(ApiKeyRow.user_id == user_id).execute()

    @staticmethod
    def count_by_status() -> dict[tuple[str, ...], float]:
        """Return the number of keys for each status."""
        over = (ApiKeyRow.expires_at <= clock.now(), "expired")
        status = peewee.Case(None, [(ApiKeyRow.revoked_at.is_null(False), "revoked"), over], "active")
        query: Any = ApiKeyRow.select(status, peewee.fn.COUNT(ApiKeyRow.id)).group_by(peewee.SQL("1"))
        return {**{(each,): 0.0 for each in STATUSES}, **{(each,): float(count) for each, count in query.tuples()}}

    # -- internals

    def _revoke_where(self, which: Any) -> int:
        over = {"revoked_at": clock.now(), "old_hash": None, "old_until": None}
        ended = list(ApiKeyRow.update(**over).where(which).returning(ApiKeyRow).execute())
        for row in ended:
            self._publish_event(ApiKeyRevoked(key_id=row.id, name=row.name), "revoke", row, {})
            self._forget_cached_key(row.id)
        return len(ended)

    def _key_expiry(self, new: NewKey) -> str:
        max_days = self._settings.get(KEY_MAX_DAYS)
        if new.expires_at is None:
            return clock.now(min(self._settings.get(KEY_DAYS), max_days) * DAY)
        asked = clock.from_datetime(new.expires_at)
        if asked <= clock.now():
            raise Invalid.at("/expires_at", "in_the_past", "must be in the future")
        if asked > clock.now(max_days * DAY):
            raise Invalid.at("/expires_at", "too_large", f"must be at most {max_days} days from now")
        return asked

    def _check_scopes(self, scopes: Iterable[str], role: str) -> None:
        held = self._permissions.held_by(role)
        faults = [
            FieldError(
                f"/scopes/{index}",
                "not_allowed",
                f"{scope} matches no permission of your role; `corral api GET /security/scopes` lists the scopes.",
            )
            for index, scope in enumerate(scopes)
            if not within_scopes(held, (scope,))
        ]
        if faults:
            raise Invalid("Some scopes match no permission that you have.", errors=faults)

    def _forget_cached_key(self, key_id: str) -> None:
        """Remove the key from the credential cache, so that the next request with it queries the database."""
        after_commit(lambda: self._credentials.forget(lambda caller: caller.kind == "api_key" and caller.id == key_id))

    def _publish_event(self, event: Event, verb: str, row: ApiKeyRow, details: dict[str, Any]) -> None:
        emit(event, object=("api_key", row.id), owner=row.user_id)
        if self.audit is not None:
            entry = AuditEntry(
                action=f"security.api_key.{verb}",
                object_type="api_key",
                object_id=row.id,
                object_name=row.name,
                details={"prefix": row.prefix, "owner_id": row.user_id, **details},
            )
            self.audit.record(entry)

    def _issued_key(self, row: ApiKeyRow, text: str) -> IssuedKey:
        view = self._key_views([row])[0]
        return IssuedKey(**{name: getattr(view, name) for name in view.__struct_fields__}, key=text)

    def _key_views(self, rows: Sequence[ApiKeyRow]) -> Views:
        owners = self._accounts.get_many({row.user_id for row in rows})
        return [_key_view(row, OwnerView(id=row.user_id, email=owners[row.user_id].email)) for row in rows]


STATUSES = ("active", "expired", "revoked")


def _has_status(status: str) -> Any:
    if status == "revoked":
        return ApiKeyRow.revoked_at.is_null(False)
    now = clock.now()
    lives = ApiKeyRow.expires_at > now if status == "active" else ApiKeyRow.expires_at <= now
    return ApiKeyRow.revoked_at.is_null() & lives


def _key_status(row: ApiKeyRow) -> Any:
    if row.revoked_at is not None:
        return "revoked"
    return "active" if row.expires_at > clock.now() else "expired"


def _find_key(key_id: str, whose: Any) -> ApiKeyRow:
    row: ApiKeyRow | None = ApiKeyRow.get_or_none((ApiKeyRow.id == key_id) & whose)
    if row is None:
        raise NotFound("There is no API key with this id.")
    return row


def _key_view(row: ApiKeyRow, owner: OwnerView) -> KeyView:
    derived = {"status": _key_status(row), "owner": owner}
    fields = {name: getattr(row, name) for name in KeyView.__struct_fields__ if name not in derived}
    return KeyView(**fields, **derived)


def _parse_networks(given: Iterable[str]) -> list[str]:
    found, faults = [], []
    for index, text in enumerate(given):
        try:
            found.append(parse_network(text))
        except ValueError as error:
            faults.append(FieldError(f"/allowed_cidrs/{index}", "bad_format", f"{error}."))
    if faults:
        raise Invalid("Some networks are not valid.", errors=faults)
    return list(dict.fromkeys(found))


def new_key(public: str | None = None) -> str:
    """Generate a token with 256 random bits.

    If `public`, the visible beginning of an existing token (`crl_<id>`), is given, the new token begins with it.
    """
    shown = public or PREFIX + _random_text(ID)
    body = f"{shown}_{_random_text(SECRET)}"
    return body + _checksum(body)


def is_well_formed_key(text: str) -> bool:
    """Return whether the text has the format of an API key token and a correct checksum."""
    return (
        len(text) == LENGTH
        and text.startswith(PREFIX)
        and text.isascii()
        and text[SHOWN] == "_"
        and text[-CHECK:] == _checksum(text[:-CHECK])
    )


def _random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(CHECK):
        number, digit = divmod(number, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


# -- authentication


_COLUMNS = (
    ApiKeyRow.id,
    ApiKeyRow.user_id,
    ApiKeyRow.scopes,
    ApiKeyRow.allowed_cidrs,
    ApiKeyRow.expires_at,
    ApiKeyRow.revoked_at,
    ApiKeyRow.hash,
    ApiKeyRow.old_hash,
    ApiKeyRow.old_until,
)
_BY_HASH = Statement(lambda p: ApiKeyRow.select(*_COLUMNS).where(ApiKeyRow.hash == p("hash")).tuples())
_BY_OLD_HASH = Statement(lambda p: ApiKeyRow.select(*_COLUMNS).where(ApiKeyRow.old_hash == p("hash")).tuples())
_BY_ID = Statement(lambda p: ApiKeyRow.select(*_COLUMNS).where(ApiKeyRow.id == p("id")).tuples())


RESULTS = ("ok", "malformed", "unknown", "revoked", "expired", "disabled", "owner")


class KeyMetrics:
    """Counts the results of API key authentication since this process started."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()


class ApiKeyAuthenticator:
    """Authenticates requests with API keys. Implements the protocols `Authenticator` and `RecheckingAuthenticator`."""

    def __init__(self, accounts: Accounts, permissions: Permissions, settings: Settings, metrics: KeyMetrics) -> None:
        self._accounts, self._permissions, self._settings = accounts, permissions, settings
        self._metrics = metrics

    def recognises(self, credential: str) -> bool:
        return credential.startswith(PREFIX)

    def authenticate(self, credential: str) -> Principal:
        if not is_well_formed_key(credential):
            raise self._refusal(
                "malformed", "The checksum of the API key is incorrect; check that you copied the whole key."
            )
        hashed = digest(credential)
        found = _BY_HASH.one({"hash": hashed}) or _BY_OLD_HASH.one({"hash": hashed})
        if found is None:
            raise self._refusal("unknown", "This API key does not exist.")
        return self._principal_of_token_hash(hashed, *found)

    def reread(self, caller: Principal) -> Principal | None:
        if caller.kind != "api_key":
            return None
        found = _BY_ID.one({"id": caller.id})
        if found is None:
            raise self._refusal("unknown", "This API key no longer exists.")
        return self._principal_of_token_hash(caller.token_id, *found)

    def _principal_of_token_hash(self, hashed: str | None, *row: Any) -> Principal:
        """Return the principal for the hash of a key's token.

        `row` contains the columns of the key. For a limited time after a rotation, the old token is accepted too.
        """
        *fields, present, former, until = row
        caller = self._principal_of_key(*fields)
        ends = caller.expires_at or 0.0
        if hashed != present:
            if hashed is None or hashed != former or until <= clock.now():
                raise self._refusal("revoked", "This API key was rotated; use the new key.")
            ends = min(ends, clock.parse_instant(until))
        return msgspec.structs.replace(caller, expires_at=ends, token_id=hashed)

    def _principal_of_key(
        self, key_id: str, user_id: str, scopes: str, cidrs: str, expires_at: str, revoked_at: str | None
    ) -> Principal:
        if revoked_at is not None:
            raise self._refusal("revoked", "This API key was revoked.")
        if expires_at <= clock.now():
            raise self._refusal("expired", "This API key has expired.", code="token_expired")
        if not self._settings.get(KEYS_ENABLED):
            raise self._refusal("disabled", "API keys are disabled on this installation.")
        try:
            owner = self._accounts.principal_of(user_id)
        except InsufficientRights:
            raise self._refusal("owner", "The owner of this API key is not active.") from None
        wanted: list[str] = msgspec.json.decode(scopes)
        held = owner.permissions
        left = within_scopes(held, wanted)
        return Principal(
            kind="api_key",
            id=key_id,
            user_id=user_id,
            role=owner.role,
            permissions=left,
            out_of_scope=held - left,
            named_scopes=held.intersection(wanted),
            expires_at=clock.parse_instant(expires_at),
            limited=owner.limited,
            networks=tuple(msgspec.json.decode(cidrs)),
        )

    def _refusal(self, result: str, detail: str, *, code: str | None = None) -> Unauthorized:
        self._metrics.results[result] += 1
        return Unauthorized(detail, code=code)
