"""Account lockout: after too many failed sign-ins with one email address, the address is locked for some time.

Before a password or code is verified, a single conditional UPDATE reserves the attempt. The reservation succeeds only
if the number of recent failures plus the number of attempts in flight is below the threshold. An attacker therefore
gains nothing by guessing in parallel. Parallel attempts with the correct password wait for each other and cause no
lockout.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
import peewee

from corral import clock
from corral.crypto import digest
from corral.database.engine import Work
from corral.database.unit import UnitContext, after_commit
from corral.errors import TooMany, Unavailable
from corral.events.event import emit
from corral.plugin import Audit, AuditEntry, Settings
from corral_core.accounts.api import Mail, UserLocked
from corral_core.accounts.models import LockoutRow, UserRow
from corral_core.accounts.service.audit_actions import audit_action
from corral_core.accounts.service.email_addresses import normalize_address
from corral_core.accounts.settings import DAY, HOUR, LOCKOUT_SECONDS, LOCKOUT_THRESHOLD, LOCKOUT_WINDOW

WAIT_SECONDS, POLL_SECONDS = 5.0, 0.05
HELD_SECONDS = 60.0  # reservations of a crashed process expire after this time
KEEP_SECONDS = 2 * DAY  # longer than any window and any lockout
INSTANT, KEPT = 24, 20  # characters of an instant; number of failures that are stored, which is the highest threshold


class _AttemptLimiter(msgspec.Struct):
    """Limits the number of concurrent sign-in attempts for one email address in this process.

    Excess attempts wait here without querying the database. `users` is the number of attempts that use this object.
    """

    room: asyncio.Semaphore
    users: int = 0


class Lockout:
    """Counts sign-in attempts and locks email addresses. Only this class writes lockouts.

    Every function except `reserve_attempt` runs in the caller's unit of work.
    """

    audit: Audit | None = None
    mail: Mail | None = None

    def __init__(self, work: Work, settings: Settings) -> None:
        self._work, self._settings = work, settings
        self._gates: dict[str, _AttemptLimiter] = {}
        self.locked: Counter[tuple[str, ...]] = Counter({(): 0})
        """The number of lockouts that this process has started."""

    @contextlib.asynccontextmanager
    async def reserve_attempt(self, email: str, entry: UnitContext) -> AsyncIterator[str]:
        """Reserve an attempt to sign in with this address. Yield the key with which to report the outcome.

        Inside the context, the caller must report the outcome in a unit of work, with `release_attempt`,
        `settle_success` or `settle_failure`. If an exception ends the context, nothing was verified, so the attempt is
        released. Raise `TooMany` (`account_locked`) if the address is locked. If the attempts in flight exhaust the
        threshold, wait up to 5 s for them to end, and then raise `TooMany` (`concurrency_limit`).
        """
        key = digest(normalize_address(email))
        until = time.monotonic() + WAIT_SECONDS
        async with self._limit_concurrency(key, until):
            while not await self._work(lambda: self._reserve(key), entry=entry):
                if time.monotonic() > until:
                    raise TooMany(
                        "Too many sign-ins with this email address are in progress; try again.",
                        code="concurrency_limit",
                    )
                await asyncio.sleep(POLL_SECONDS)
            try:
                yield key
            except Exception:
                with contextlib.suppress(Unavailable):  # the reservation expires anyway
                    await asyncio.shield(self._work(lambda: self.release_attempt(key), entry=entry))
                raise

    def release_attempt(self, key: str) -> None:
        """Release a reserved attempt without counting it as a failure or a success."""
        LockoutRow.update(in_flight=_decrement_in_flight()).where(LockoutRow.key == key).execute()

    def settle_success(self, key: str, user_id: str) -> None:
        """Record that an attempt succeeded: release its reservation and reset earlier failures."""
        LockoutRow.update(in_flight=_decrement_in_flight(), failed="", locks=0).where(LockoutRow.key == key).execute()
        self._clear_locked_until(user_id)

    def settle_failure(self, key: str, user_id: str | None) -> None:
        """Record that an attempt failed. If the number of failures reaches the threshold, lock the email address.

        Each lockout lasts twice as long as the previous one, but at most an hour. If the previous lockout ended at
        least a day ago, the duration is reset to `security.lockout_seconds`.
        """
        now = clock.now()
        failed: Any = peewee.fn.SUBSTR(peewee.Value(now).concat(LockoutRow.failed), 1, KEPT * INSTANT)
        update = LockoutRow.update(in_flight=_decrement_in_flight(), failed=failed).where(LockoutRow.key == key)
        row = next(iter(update.returning(LockoutRow).execute()), None)  # from here on, this unit locks the row
        if row is None or len(self._failures_within_window(row.failed)) < self._settings.get(LOCKOUT_THRESHOLD):
            return
        again = row.locked_until is not None and row.locked_until > clock.now(-DAY)
        locks = row.locks + 1 if again else 1
        until = clock.now(min(self._settings.get(LOCKOUT_SECONDS) * 2 ** min(locks - 1, 6), HOUR))
        LockoutRow.update(failed="", locked_until=until, locks=locks).where(LockoutRow.key == key).execute()
        after_commit(lambda: self.locked.update([()]))
        if user_id is not None:
            UserRow.update(locked_until=until).where(UserRow.id == user_id).execute()
            emit(UserLocked(user_id=user_id, until=until), object=("user", user_id), owner=user_id)
            self._record_audit("auth.user.lock", user_id, {"until": until})
            if self.mail is not None:  # to the stored address, not to the address as the client spelled it
                self.mail.notify(UserRow.get_by_id(user_id).email, "locked", until=until)

    def unlock(self, email: str, user_id: str) -> None:
        """End the lockout of an address immediately and reset its failures."""
        key = digest(normalize_address(email))
        LockoutRow.update(failed="", locks=0, locked_until=None).where(LockoutRow.key == key).execute()
        if self._clear_locked_until(user_id):
            self._record_audit(audit_action("unlock", user_id), user_id, {})

    def count_failures(self, emails: Iterable[str]) -> dict[str, int]:
        """Return the number of failures within the lockout window, keyed by address.

        Addresses without failures are omitted.
        """
        keys = {digest(normalize_address(email)): email for email in emails}
        rows = LockoutRow.select().where(LockoutRow.key.in_(list(keys)) & (LockoutRow.failed != ""))
        counts = {keys[row.key]: len(self._failures_within_window(row.failed)) for row in rows}
        return {email: count for email, count in counts.items() if count}

    # -- helpers

    @contextlib.asynccontextmanager
    async def _limit_concurrency(self, key: str, until: float) -> AsyncIterator[None]:
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = _AttemptLimiter(asyncio.Semaphore(self._settings.get(LOCKOUT_THRESHOLD)))
        gate.users += 1
        try:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await gate.room.acquire()
            except TimeoutError:
                raise TooMany(
                    "Too many sign-ins with this email address are in progress; try again.", code="concurrency_limit"
                ) from None
            try:
                yield
            finally:
                gate.room.release()
        finally:
            gate.users -= 1
            if not gate.users:
                self._gates.pop(key, None)

    def _reserve(self, key: str) -> bool:
        """Reserve an attempt with a single conditional UPDATE. Return False if too many attempts are in flight.

        Raise `TooMany` (`account_locked`) if the email address is locked.
        """
        now, threshold, window = clock.now(), self._settings.get(LOCKOUT_THRESHOLD), self._settings.get(LOCKOUT_WINDOW)
        row, held = LockoutRow, clock.now(HELD_SECONDS)
        in_flight: Any = peewee.Case(None, [(row.reserved_until > now, row.in_flight)], 0)
        # the failure at position `threshold - in_flight`, newest first: if it is absent or older than the window, the
        # failures within the window and the attempts in flight together are below the threshold
        decisive = peewee.fn.SUBSTR(row.failed, (threshold - in_flight - 1) * INSTANT + 1, INSTANT)
        free = row.locked_until.is_null() | (row.locked_until <= now)
        allowed = free & (in_flight < threshold) & (decisive <= clock.now(-window))
        insert = row.insert(key=key, in_flight=1, reserved_until=held).on_conflict(
            conflict_target=[row.key], update={row.in_flight: in_flight + 1, row.reserved_until: held}, where=allowed
        )
        return bool(insert.as_rowcount().execute()) or self._raise_if_locked(row.get_by_id(key), now, threshold)

    def _raise_if_locked(self, row: LockoutRow, now: str, threshold: int) -> bool:
        """Raise `TooMany` if the email address is locked.

        If it is not locked, return False: the attempt cannot start before other attempts have ended.
        """
        if row.locked_until is not None and row.locked_until > now:
            raise _locked_error(row.locked_until)
        failures = self._failures_within_window(row.failed)
        if len(failures) >= threshold:  # the threshold was lowered after these failures
            window = self._settings.get(LOCKOUT_WINDOW)
            raise _locked_error(clock.format_instant(clock.parse_instant(failures[threshold - 1]) + window))
        return False

    def _failures_within_window(self, failed: str) -> list[str]:
        """Return the times of the failures within the lockout window, newest first.

        `failed` contains the times of all failures as one string.
        """
        since = clock.now(-self._settings.get(LOCKOUT_WINDOW))
        instants = [failed[at : at + INSTANT] for at in range(0, len(failed), INSTANT)]
        return [each for each in instants if each > since]

    @staticmethod
    def _clear_locked_until(user_id: str) -> bool:
        locked = (UserRow.id == user_id) & UserRow.locked_until.is_null(False)
        return bool(UserRow.update(locked_until=None).where(locked).execute())

    def _record_audit(self, action: str, user_id: str, details: dict[str, Any]) -> None:
        if self.audit is not None:
            self.audit.record(AuditEntry(action=action, object_type="user", object_id=user_id, details=details))


def delete_old_lockouts(at_once: int = 500) -> int:
    """Delete at most `at_once` lockouts of email addresses without an attempt in the last two days.

    Return the number of deleted rows.
    """
    old = LockoutRow.select(LockoutRow.key).where(LockoutRow.reserved_until < clock.now(-KEEP_SECONDS)).limit(at_once)
    return int(LockoutRow.delete().where(LockoutRow.key.in_(old)).execute())


def _decrement_in_flight() -> Any:
    return peewee.Case(None, [(LockoutRow.in_flight > 0, LockoutRow.in_flight - 1)], 0)


def _locked_error(until: str) -> TooMany:
    seconds = max(1, round(clock.parse_instant(until) - clock.time_s()))
    return TooMany(
        f"Too many failed sign-ins; try again after {until}.",
        code="account_locked",
        retry_after=seconds,
        retry_at=until,
    )
