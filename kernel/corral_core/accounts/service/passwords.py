"""Password hashing with Argon2id, and the password policy: rules, breached passwords, history and expiry.

Hashing is expensive by design, so it runs in its own thread pool, never in a unit of work.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from corral import clock
from corral.database.engine import Work
from corral.errors import FieldError, Invalid, Unavailable
from corral.ids import new_id
from corral.metrics.histogram import Histogram
from corral.plugin import Settings
from corral_core.accounts.models import FormerPasswordRow, UserRow
from corral_core.accounts.settings import (
    BREACHED_CHECK,
    CONTEXT_WORDS,
    DAY,
    HISTORY,
    MAX_AGE_DAYS,
    MIN_LENGTH,
    REQUIRE_DIGIT,
    REQUIRE_LOWER,
    REQUIRE_SYMBOL,
    REQUIRE_UPPER,
)

if TYPE_CHECKING:
    from argon2 import PasswordHasher

log = logging.getLogger("corral.auth")
T = TypeVar("T")

MAX_LENGTH = 128
QUEUE_LIMIT = 64
TIME_COST, MEMORY_KIB, PARALLELISM = 2, 19 * 1024, 1
THREADS = os.cpu_count() or 1
_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="corral-password")

# Verified if there is no hash, so that an unknown address takes as long as a known one. Nobody knows its password.
DUMMY_HASH = "$argon2id$v=19$m=19456,t=2,p=1$ysAYvpmHkcmlHvn0g+z/sw$3YmGz+WBo+1yu6pyarQK6/pEkWYMqDAHXpG5G5qJlV8"


@functools.cache
def _argon2_hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=TIME_COST, memory_cost=MEMORY_KIB, parallelism=PARALLELISM)


class Passwords:
    """Hashes and verifies passwords in a thread pool with one thread per core.

    `hash_password` and `verify_password` raise `Unavailable` (`overloaded`) if the pool's queue is full. Call them
    outside a unit of work.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self.hash_seconds = Histogram()
        """The time that this process took to compute each hash, excluding the time spent in the queue."""

    async def hash_password(self, password: str, *, pointer: str = "/password") -> str:
        """Hash a password after checking only its length. The caller must apply the password policy."""
        _check_length(password, pointer)
        return await self._run_in_pool(lambda: _argon2_hasher().hash(password))

    async def verify_password(self, password: str, hashed: str | None, *, pointer: str = "/password") -> bool:
        """Return whether the password matches the hash. If the hash is None, return False, but take the same time."""
        _check_length(password, pointer)
        return await self._run_in_pool(lambda: _verify_hash(password, hashed))

    @staticmethod
    def needs_rehash(hashed: str) -> bool:
        """Return whether the hash was computed with outdated parameters."""
        return _argon2_hasher().check_needs_rehash(hashed)

    async def _run_in_pool(self, work: Callable[[], T]) -> T:
        if self._waiting >= THREADS + QUEUE_LIMIT:
            raise Unavailable("Too many sign-ins are in progress; try again in a moment.", code="overloaded")
        self._waiting += 1
        try:
            value, seconds = await asyncio.get_running_loop().run_in_executor(_threads, _measure_seconds, work)
        finally:
            self._waiting -= 1
        self.hash_seconds.observe(seconds)
        return value


def _measure_seconds(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    value = work()
    return value, time.perf_counter() - began


def _check_length(password: str, pointer: str) -> None:
    if not password:
        raise Invalid.at(pointer, "too_short", "The password is empty.")
    if len(password) > MAX_LENGTH:
        raise Invalid.at(pointer, "too_long", f"A password must have at most {MAX_LENGTH} characters.")


def _verify_hash(password: str, hashed: str | None) -> bool:
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        _argon2_hasher().verify(hashed or DUMMY_HASH, password)
        return hashed is not None
    except VerificationError:
        return False
    except InvalidHashError:
        log.error("a stored password hash is not an Argon2 hash")
        return False


# -- the password policy


PRODUCT = "corral"
SHORTEST_WORD = 4  # shorter words occur in passwords by chance

_CLASSES = (
    (REQUIRE_UPPER, str.isupper, "core.no_upper", "an upper-case letter"),
    (REQUIRE_LOWER, str.islower, "core.no_lower", "a lower-case letter"),
    (REQUIRE_DIGIT, str.isdigit, "core.no_digit", "a digit"),
    (REQUIRE_SYMBOL, lambda letter: not letter.isalnum() and not letter.isspace(), "core.no_symbol", "a symbol"),
)


class PasswordPolicy:
    """Checks new passwords against the rules of the policy. Changes to the rules do not affect existing passwords."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check_password(self, password: str, *, email: str, full_name: str, pointer: str) -> None:
        """Raise `Invalid` (`weak_password`) with one field error for each rule that the password breaks."""
        faults = [FieldError(pointer, code, detail) for code, detail in self._broken_rules(password, email, full_name)]
        if faults:
            raise Invalid(
                "Choose another password: " + " ".join(each.detail for each in faults),
                code="weak_password",
                errors=faults,
            )

    def current_rules(self) -> dict[str, int | bool]:
        """Return the rules of the policy, for display where users choose a new password."""
        rules: dict[str, int | bool] = {"min_length": self._settings.get(MIN_LENGTH), "max_length": 128}
        rules["breached_check"] = self._settings.get(BREACHED_CHECK)
        for setting, _, _, _ in _CLASSES:
            rules[setting.name.partition(".")[2]] = self._settings.get(setting)
        return rules

    def _broken_rules(self, password: str, email: str, full_name: str) -> Iterator[tuple[str, str]]:
        least = self._settings.get(MIN_LENGTH)
        if len(password) < least:
            yield "too_short", f"Use at least {least} characters."
        folded = password.casefold()
        own = [email, email.partition("@")[0], *re.split(r"\W+", full_name)]
        words = [word for word in (PRODUCT, *own) if len(word) >= SHORTEST_WORD] + self._settings.get(CONTEXT_WORDS)
        if any(word.casefold() in folded for word in words):
            yield (
                "core.context_word",
                "The password must not contain your name, your address or a name of this product.",
            )
        if self._settings.get(BREACHED_CHECK) and is_breached(password):
            yield "core.breached", "The password, or one like it, is known from a data breach."
        for setting, matches, code, what in _CLASSES:
            if self._settings.get(setting) and not any(matches(letter) for letter in password):
                yield code, f"Use {what}."


SHORTEST = 2
_ROWS = (string.digits, "1234567890", string.ascii_lowercase, "qwertyuiop", "asdfghjkl", "zxcvbnm")
_RUNS = tuple(row[::step] * 128 for row in _ROWS for step in (1, -1))
_SPELLED = str.maketrans("@4310!$57", "aaeioisst")


def is_breached(password: str) -> bool:
    """Return whether the password is on the list of breached passwords, or is a simple variant of a listed one.

    Variants add digits or symbols at the start or end, replace letters with similar symbols, or repeat the whole
    password. Keyboard sequences and repetitions of one or two characters also count as breached.
    """
    folded = password.casefold()
    if len(_repeating_unit(folded)) <= SHORTEST or any(folded in run for run in _RUNS):
        return True
    return any(_is_in_list(form) for form in _password_variants(folded))


def _password_variants(folded: str) -> set[str]:
    said = _repeating_unit(folded)
    found = set()
    for form in (folded, said):
        stem = form.strip("".join({letter for letter in form if not letter.isalpha()}))
        found |= {form, stem, stem.translate(_SPELLED)}
    return found


def _repeating_unit(text: str) -> str:
    """Return the shortest text whose repetition yields `text`, such as `ab` for `ababab`."""
    again = (text + text).find(text, 1)
    return text[:again]


def _is_in_list(form: str) -> bool:
    return bool(form) and "\n" not in form and f"\n{form}\n".encode() in _breached_passwords()


@functools.cache
def _breached_passwords() -> bytes:
    """Return the list of breached passwords, one lower-case password per line.

    The list is searched without being parsed, so it takes no more memory than the file.
    """
    return resources.files("corral_core.accounts").joinpath("breached_passwords.txt").read_bytes()


class PasswordHistory:
    """Stores hashes of previous passwords, and enforces password expiry. Only this class writes these hashes.

    Every function except `refuse_former` runs in the caller's unit of work.
    """

    def __init__(self, work: Work, passwords: Passwords, settings: Settings) -> None:
        self._work, self._passwords, self._settings = work, passwords, settings

    async def refuse_former(self, user_id: str, password: str, *, pointer: str) -> None:
        """Raise `Invalid` (`weak_password`) for the current or a previous password, if the policy forbids reuse.

        The caller must already be authenticated as this user, because the result reveals previous passwords. Runs
        outside a unit of work.
        """
        kept = self._settings.get(HISTORY)
        if not kept:
            return
        for hashed in await self._work(lambda: self._former_hashes(user_id, kept), read=True):
            if await self._passwords.verify_password(password, hashed, pointer=pointer):
                detail = f"Do not reuse the current password or one of your last {kept} passwords."
                raise Invalid.at(pointer, "core.reused", detail, problem="weak_password")

    def add_password(self, user_id: str, hashed: str | None) -> None:
        """Store the hash of a replaced password, and delete hashes that the policy no longer needs."""
        kept = self._settings.get(HISTORY)
        mine = FormerPasswordRow.user_id == user_id
        if kept and hashed is not None:
            FormerPasswordRow.create(id=new_id(), user_id=user_id, hash=hashed)
        newest = FormerPasswordRow.select(FormerPasswordRow.id).where(mine).order_by(FormerPasswordRow.id.desc())
        keep = [row.id for row in newest.limit(kept)] if kept else []
        FormerPasswordRow.delete().where(mine & FormerPasswordRow.id.not_in(keep)).execute()

    def require_change_of_expired(self, user: UserRow) -> None:
        """Require the user to change a password that has expired under the policy. Call this method at each sign-in."""
        days = self._settings.get(MAX_AGE_DAYS)
        if days is not None and (user.password_changed_at or "") <= clock.now(-days * DAY):
            due = (UserRow.id == user.id) & (UserRow.password_hash == user.password_hash)
            UserRow.update(must_change_password=True).where(due).execute()

    @staticmethod
    def delete_of_user(user_id: str) -> None:
        """Delete the hashes of a purged account's previous passwords."""
        FormerPasswordRow.delete().where(FormerPasswordRow.user_id == user_id).execute()

    @staticmethod
    def _former_hashes(user_id: str, kept: int) -> list[str]:
        newest = FormerPasswordRow.select().where(FormerPasswordRow.user_id == user_id)
        former = [row.hash for row in newest.order_by(FormerPasswordRow.id.desc()).limit(kept)]
        present = UserRow.get_or_none(UserRow.id == user_id)
        return ([present.password_hash] if present is not None and present.password_hash else []) + former
