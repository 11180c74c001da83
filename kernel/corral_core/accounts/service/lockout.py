"""Account lockout: too many failed sign-ins to one address lock it for some time.

An attempt is reserved before anything is verified, by one guarded update: allowed while the failures within the window
and the attempts in flight together stay below the threshold. So guesses in parallel find no more room than guesses one
after the other, and right passwords in parallel, which only wait for one another, lock nobody out.
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
from corral.database.unit import Entry, after_commit
from corral.errors import TooMany, Unavailable
from corral.events.event import emit
from corral.plugin import Audit, AuditEntry, Settings
from corral_core.accounts.api import Mail
from corral_core.accounts.events import UserLocked
from corral_core.accounts.models import LockoutRow, UserRow
from corral_core.accounts.service.addresses import normalise
from corral_core.accounts.service.audit import action
from corral_core.accounts.settings import DAY, HOUR, LOCKOUT_SECONDS, LOCKOUT_THRESHOLD, LOCKOUT_WINDOW

WAIT_SECONDS, POLL_SECONDS = 5.0, 0.05
HELD_SECONDS = 60.0  # reservations of a process that died expire after this
KEEP_SECONDS = 2 * DAY  # longer than any window and lock
INSTANT, KEPT = 24, 20  # letters of an instant; failures that are kept: the highest threshold


class _Gate(msgspec.Struct):
    """Limits the attempts of one address in this process, so that excess ones do not query the database."""

    room: asyncio.Semaphore
    users: int = 0


class Lockout:
    """The only writer of lockouts. Every function except `turn` joins the unit of work."""

    audit: Audit | None = None
    mail: Mail | None = None

    def __init__(self, work: Work, settings: Settings) -> None:
        self._work, self._settings = work, settings
        self._gates: dict[str, _Gate] = {}
        self.locked: Counter[tuple[str, ...]] = Counter({(): 0})
        """The number of lockouts by this process."""

    @contextlib.asynccontextmanager
    async def turn(self, email: str, entry: Entry) -> AsyncIterator[str]:
        """Reserve an attempt on an address, in whatever spelling; gives the key by which a unit inside must settle it.

        `TooMany(account_locked)` while it is locked; waits at most 5 s while only attempts in flight fill the room. An
        exception inside means that nothing was verified: the attempt is given back.
        """
        key = digest(normalise(email))
        until = time.monotonic() + WAIT_SECONDS
        async with self._gate(key, until):
            while not await self._work(lambda: self._reserve(key), entry=entry):
                if time.monotonic() > until:
                    raise TooMany("Too many sign-ins of this address at once; try again.", code="concurrency_limit")
                await asyncio.sleep(POLL_SECONDS)
            try:
                yield key
            except Exception:
                with contextlib.suppress(Unavailable):  # the reservation expires by itself
                    await asyncio.shield(self._work(lambda: self.give_back(key), entry=entry))
                raise

    def give_back(self, key: str) -> None:
        """Release the attempt without counting it as a failure or a success."""
        LockoutRow.update(in_flight=_one_less()).where(LockoutRow.key == key).execute()

    def clear(self, key: str, user_id: str) -> None:
        """Settle a successful attempt: earlier failures are reset."""
        LockoutRow.update(in_flight=_one_less(), failed="", locks=0).where(LockoutRow.key == key).execute()
        self._unmark(user_id)

    def fail(self, key: str, user_id: str | None) -> None:
        """Settle a failed attempt. At the threshold the address is locked, twice as long as the last time."""
        now = clock.now()
        failed: Any = peewee.fn.SUBSTR(peewee.Value(now).concat(LockoutRow.failed), 1, KEPT * INSTANT)
        update = LockoutRow.update(in_flight=_one_less(), failed=failed).where(LockoutRow.key == key)
        row = next(iter(update.returning(LockoutRow).execute()), None)  # from here on this unit has the row
        if row is None or len(self._within(row.failed)) < self._settings.get(LOCKOUT_THRESHOLD):
            return
        again = row.locked_until is not None and row.locked_until > clock.now(-DAY)
        locks = row.locks + 1 if again else 1
        until = clock.now(min(self._settings.get(LOCKOUT_SECONDS) * 2 ** min(locks - 1, 6), HOUR))
        LockoutRow.update(failed="", locked_until=until, locks=locks).where(LockoutRow.key == key).execute()
        after_commit(lambda: self.locked.update([()]))
        if user_id is not None:
            UserRow.update(locked_until=until).where(UserRow.id == user_id).execute()
            emit(UserLocked(user_id=user_id, until=until), object=("user", user_id), owner=user_id)
            self._record("auth.user.lock", user_id, {"until": until})
            if self.mail is not None:  # to the stored address, not as the client spelled it
                self.mail.notify(UserRow.get_by_id(user_id).email, "locked", until=until)

    def unlock(self, email: str, user_id: str) -> None:
        """End a lockout immediately and reset the failures."""
        key = digest(normalise(email))
        LockoutRow.update(failed="", locks=0, locked_until=None).where(LockoutRow.key == key).execute()
        if self._unmark(user_id):
            self._record(action("unlock", user_id), user_id, {})

    def failures(self, emails: Iterable[str]) -> dict[str, int]:
        """The number of failed attempts within the window, by address as given; addresses without one are left out."""
        keys = {digest(normalise(email)): email for email in emails}
        rows = LockoutRow.select().where(LockoutRow.key.in_(list(keys)) & (LockoutRow.failed != ""))
        counts = {keys[row.key]: len(self._within(row.failed)) for row in rows}
        return {email: count for email, count in counts.items() if count}

    # -- parts

    @contextlib.asynccontextmanager
    async def _gate(self, key: str, until: float) -> AsyncIterator[None]:
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = _Gate(asyncio.Semaphore(self._settings.get(LOCKOUT_THRESHOLD)))
        gate.users += 1
        try:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await gate.room.acquire()
            except TimeoutError:
                raise TooMany(
                    "Too many sign-ins of this address at once; try again.", code="concurrency_limit"
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
        """Reserve an attempt by one guarded update. Returns False while attempts in flight use up the allowance."""
        now, threshold, window = clock.now(), self._settings.get(LOCKOUT_THRESHOLD), self._settings.get(LOCKOUT_WINDOW)
        row, held = LockoutRow, clock.now(HELD_SECONDS)
        in_flight: Any = peewee.Case(None, [(row.reserved_until > now, row.in_flight)], 0)
        # with so many in flight, this failure decides: it must be none, or lie before the window
        decisive = peewee.fn.SUBSTR(row.failed, (threshold - in_flight - 1) * INSTANT + 1, INSTANT)
        free = row.locked_until.is_null() | (row.locked_until <= now)
        allowed = free & (in_flight < threshold) & (decisive <= clock.now(-window))
        insert = row.insert(key=key, in_flight=1, reserved_until=held).on_conflict(
            conflict_target=[row.key], update={row.in_flight: in_flight + 1, row.reserved_until: held}, where=allowed
        )
        return bool(insert.as_rowcount().execute()) or self._may_wait(row.get_by_id(key), now, threshold)

    def _may_wait(self, row: LockoutRow, now: str, threshold: int) -> bool:
        """Return False to wait; raise `TooMany` if waiting would not help."""
        if row.locked_until is not None and row.locked_until > now:
            raise _locked(row.locked_until)
        failures = self._within(row.failed)
        if len(failures) >= threshold:  # the threshold was lowered meanwhile
            window = self._settings.get(LOCKOUT_WINDOW)
            raise _locked(clock.format_instant(clock.parse_instant(failures[threshold - 1]) + window))
        return False

    def _within(self, failed: str) -> list[str]:
        """The failures within the window, the newest first."""
        since = clock.now(-self._settings.get(LOCKOUT_WINDOW))
        instants = [failed[at : at + INSTANT] for at in range(0, len(failed), INSTANT)]
        return [each for each in instants if each > since]

    @staticmethod
    def _unmark(user_id: str) -> bool:
        locked = (UserRow.id == user_id) & UserRow.locked_until.is_null(False)
        return bool(UserRow.update(locked_until=None).where(locked).execute())

    def _record(self, action: str, user_id: str, details: dict[str, Any]) -> None:
        if self.audit is not None:
            self.audit.record(AuditEntry(action=action, object_type="user", object_id=user_id, details=details))


def prune(at_once: int = 500) -> int:
    """Delete the state of addresses without an attempt for two days."""
    old = LockoutRow.select(LockoutRow.key).where(LockoutRow.reserved_until < clock.now(-KEEP_SECONDS)).limit(at_once)
    return int(LockoutRow.delete().where(LockoutRow.key.in_(old)).execute())


def _one_less() -> Any:
    return peewee.Case(None, [(LockoutRow.in_flight > 0, LockoutRow.in_flight - 1)], 0)


def _locked(until: str) -> TooMany:
    seconds = max(1, round(clock.parse_instant(until) - clock.time_s()))
    return TooMany(
        "Too many failed sign-ins; try again later.", code="account_locked", retry_after=seconds, retry_at=until
    )
