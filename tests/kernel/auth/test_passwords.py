"""Hashing: bounded in length, time and number."""

from __future__ import annotations

import asyncio

import pytest

from corral.errors import Invalid, Unavailable
from corral_core.accounts.service import passwords as module
from corral_core.accounts.service.passwords import DUMMY_HASH, MEMORY_KIB, PARALLELISM, TIME_COST, Passwords


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passwords that reach argon2."""
    seen: list[str] = []
    real = module._argon2_hasher()

    class Spy:
        def hash(self, password: str) -> str:
            seen.append(password)
            return real.hash(password)

        def verify(self, stored: str, password: str) -> bool:
            seen.append(password)
            return real.verify(stored, password)

    monkeypatch.setattr(module, "_argon2_hasher", Spy)
    return seen


async def test_auth_8_the_last_character_counts_and_one_too_many_is_refused_unhashed(hashed: list[str]) -> None:
    passwords = Passwords()
    stored = await passwords.hash_password("p" * 127 + "a")
    assert await passwords.verify_password("p" * 127 + "a", stored)
    assert not await passwords.verify_password("p" * 127 + "b", stored)
    hashed.clear()
    for refused in ("p" * 129, "p" * 1000, ""):
        with pytest.raises(Invalid) as found:
            await passwords.hash_password(refused)
        assert found.value.code == "validation_error"
        with pytest.raises(Invalid):
            await passwords.verify_password(refused, stored)
    assert hashed == []


async def test_nobody_is_verified_against_a_hash_of_the_same_cost(hashed: list[str]) -> None:
    assert not await Passwords().verify_password("whatever it is", None)
    assert hashed == ["whatever it is"]
    assert f"m={MEMORY_KIB},t={TIME_COST},p={PARALLELISM}$" in DUMMY_HASH


async def test_hashes_of_other_parameters_are_due() -> None:
    from argon2 import PasswordHasher

    passwords = Passwords()
    assert passwords.needs_rehash(PasswordHasher(time_cost=1, memory_cost=8192, parallelism=1).hash("x"))
    assert not passwords.needs_rehash(await passwords.hash_password("correct horse battery"))


async def test_a_full_queue_is_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_LIMIT", 0)
    passwords = Passwords()
    monkeypatch.setattr(module, "THREADS", 1)
    answers = await asyncio.gather(
        *[passwords.verify_password("x" * 12, None) for _ in range(4)], return_exceptions=True
    )
    refused = [each for each in answers if isinstance(each, Unavailable)]
    assert len(refused) == 3
    assert {each.code for each in refused} == {"overloaded"}
    assert not await passwords.verify_password("x" * 12, None)  # room again


async def test_a_stored_text_that_is_no_hash_opens_nothing() -> None:
    assert not await Passwords().verify_password("whatever it is", "no hash")
