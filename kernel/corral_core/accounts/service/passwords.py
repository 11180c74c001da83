"""Password hashing with Argon2id.

Hashing is expensive by design, so it runs in its own thread pool, never in a unit of work.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from corral.errors import Invalid, Unavailable

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
def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=TIME_COST, memory_cost=MEMORY_KIB, parallelism=PARALLELISM)


class Passwords:
    """Hashes and verifies passwords in a pool with one thread per core.

    `hash` and `verify` raise `Unavailable` (`overloaded`) if the queue of the pool is full. Call them outside a unit of
    work.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self.hashed, self.hash_seconds = 0, 0.0
        """The number of hashes that this process computed, and their total duration in seconds without queueing."""

    async def hash(self, password: str, *, pointer: str = "/password") -> str:
        """Check the length of a password and hash it. The caller must apply the password policy."""
        _check_length(password, pointer)
        return await self._run(lambda: _hasher().hash(password))

    async def verify(self, password: str, hashed: str | None, *, pointer: str = "/password") -> bool:
        """Return whether the password matches the hash. If the hash is None, return False after the same time."""
        _check_length(password, pointer)
        return await self._run(lambda: _verify(password, hashed))

    @staticmethod
    def needs_rehash(hashed: str) -> bool:
        """Return whether the hash was computed with parameters other than the current ones."""
        return _hasher().check_needs_rehash(hashed)

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= THREADS + QUEUE_LIMIT:
            raise Unavailable("Too many sign-ins at the same time; try again in a moment.", code="overloaded")
        self._waiting += 1
        try:
            value, seconds = await asyncio.get_running_loop().run_in_executor(_threads, _timed, work)
        finally:
            self._waiting -= 1
        self.hashed += 1
        self.hash_seconds += seconds
        return value


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    value = work()
    return value, time.perf_counter() - began


def _check_length(password: str, pointer: str) -> None:
    if not password:
        raise Invalid.at(pointer, "too_short", "The password is empty.")
    if len(password) > MAX_LENGTH:
        raise Invalid.at(pointer, "too_long", f"A password must have at most {MAX_LENGTH} characters.")


def _verify(password: str, hashed: str | None) -> bool:
    from argon2.exceptions import InvalidHashError, VerificationError

    try:
        _hasher().verify(hashed or DUMMY_HASH, password)
        return hashed is not None
    except VerificationError:
        return False
    except InvalidHashError:
        log.error("a stored password hash is not an Argon2 hash")
        return False
