"""Failed sign-ins: however they come, no more than the threshold are verified, and nobody good is locked out."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.kernel.auth.authenticator import AuthenticatorApp
from tests.limits import within

from corral import clock
from corral.jobs.job import JobRow
from corral.testing.kit import PASSWORD, Kit
from corral_core.accounts.api import AccountRecovery
from corral_core.accounts.models import LockoutRow
from corral_core.accounts.service import passwords as passwords_module
from corral_core.accounts.service.lockout import HELD_SECONDS, Lockout, delete_old_lockouts

MakeKit = Callable[..., Awaitable[Kit]]
WRONG = "an entirely other phrase"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How many passwords were really verified: True with an account's hash, False with the dummy."""
    counts: Counter[bool] = Counter()
    real = passwords_module._verify_hash

    def spy(password: str, known: str | None) -> bool:
        counts[known is not None] += 1
        return real(password, known)

    monkeypatch.setattr(passwords_module, "_verify_hash", spy)
    return counts


async def _fail(door: Any, email: str, times: int) -> None:
    for _ in range(times):
        assert (await door.login(email, WRONG)).code == "invalid_credentials"


async def test_five_failures_lock_known_and_unknown_addresses_alike(kit: Kit, door: Any) -> None:
    user = (await kit.as_user(email="ann@example.org")).user
    session = await kit.sign_in("ann@example.org")
    for email in ("ann@example.org", "nobody@example.org"):
        await _fail(door, email, 5)
        locked = await door.login(email)  # the right password, too
        assert (locked.status, locked.code) == (429, "account_locked")
        assert 890 <= int(locked.headers["retry-after"]) <= 900
        assert locked.json()["retry_at"] > clock.now(890)
        assert locked.json()["detail"].endswith(f"try again after {locked.json()['retry_at']}.")
    me = (await session.get("/auth/me")).json()  # sessions in being go on
    assert me["locked_until"] > clock.now(890)
    told = [each for each in await kit.events() if each.type == "user.locked"]
    assert [each.payload() for each in told] == [{"user_id": user["id"], "until": me["locked_until"]}]
    await kit.as_user("auditor")
    clock.travel(901)
    assert (await door.login("ann@example.org")).status == 200
    assert (await (await kit.sign_in("ann@example.org")).get("/auth/me")).json()["locked_until"] is None


async def test_a_success_forgets_failures(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    for _ in range(3):
        await _fail(door, "ann@example.org", 4)
        assert (await door.login("ann@example.org")).status == 200


async def test_failures_count_within_a_window_that_slides(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    await _fail(door, "ann@example.org", 1)
    clock.travel(800)
    await _fail(door, "ann@example.org", 3)
    clock.travel(101)  # the first one is out of the window
    await _fail(door, "ann@example.org", 1)
    clock.travel(700)  # but the next three are not: a window that began anew would allow more than five in 15 minutes
    await _fail(door, "ann@example.org", 1)
    assert (await door.login("ann@example.org")).code == "account_locked"


async def test_locks_double_up_to_an_hour_and_end(kit: Kit, door: Any) -> None:
    waits = []
    for _ in range(4):
        await _fail(door, "ann@example.org", 5)
        locked = await door.login("ann@example.org", WRONG)
        waits.append(round(int(locked.headers["retry-after"]) / 60))
        clock.travel(int(locked.headers["retry-after"]) + 1)
    assert waits == [15, 30, 60, 60]
    clock.travel(2 * 86_400)
    await _fail(door, "ann@example.org", 5)
    assert round(int((await door.login("ann@example.org", WRONG)).headers["retry-after"]) / 60) == 15


@pytest.mark.one_engine
async def test_the_settings_rule(make_kit: MakeKit, open_door: Any) -> None:
    environ = {"CORRAL_LOCKOUT_THRESHOLD": "3", "CORRAL_LOCKOUT_SECONDS": "60", "CORRAL_LOCKOUT_WINDOW": "100"}
    door = open_door(await make_kit(plugins=[], environ=environ))
    await _fail(door, "ann@example.org", 2)
    clock.travel(101)
    await _fail(door, "ann@example.org", 3)
    assert 50 <= int((await door.login("ann@example.org", WRONG)).headers["retry-after"]) <= 60


async def test_auth_3_guesses_in_parallel_and_in_every_spelling(
    kit: Kit, door: Any, verified: Counter[bool], long_form: bool
) -> None:
    """Parallel, in many spellings, with forged client addresses: five verifications an account."""
    for email in ("ann@example.org", "bob@example.org"):
        await kit.as_user(email=email)
    await door.login("carl@example.org", WRONG)
    verified.clear()
    spellings: list[Callable[[str], str]] = [
        str.lower,
        str.upper,
        str.title,
        lambda text: f" {text}",
        lambda text: f"{text}\u00a0",
        lambda text: "".join(chr(ord(letter) + 0xFEE0) if letter.isalpha() else letter for letter in text),
    ]
    names = ["ann@example.org", "bob@example.org"]
    pick = random.Random(7)
    room = asyncio.Semaphore(60)

    async def guess(number: int) -> str | None:
        email = pick.choice(spellings)(names[number % 2])
        headers = {"X-Forwarded-For": f"203.0.113.{number % 250}", "Forwarded": f"for=198.51.100.{number % 250}"}
        async with room:
            body = {"email": email, "password": f"{WRONG} {number}"}
            return (await kit.client.post("/auth/login", body, headers=headers)).code

    codes = Counter(await asyncio.gather(*[guess(number) for number in range(10_000 if long_form else 400)]))
    assert set(codes) <= {"invalid_credentials", "account_locked", "concurrency_limit"}
    assert codes["invalid_credentials"] == 10
    assert verified == {True: 10}


async def test_right_passwords_in_parallel_wait_for_one_another_and_never_lock(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    answers = await asyncio.gather(*[door.login("ann@example.org") for _ in range(40)])
    assert {each.status for each in answers} == {200}
    mixed = [door.login("ann@example.org", WRONG if number % 4 == 3 else PASSWORD) for number in range(12)]
    answers = await asyncio.gather(*mixed)
    assert Counter(each.status for each in answers) == {200: 9, 401: 3}


async def test_attempts_hold_across_kernels_and_restarts(make_kit: MakeKit, open_door: Any) -> None:
    first, second = await make_kit(plugins=[]), await make_kit(plugins=[])
    await first.as_user(email="ann@example.org")
    doors = [open_door(first), open_door(second)]
    answers = await asyncio.gather(*[doors[number % 2].login("ann@example.org", WRONG) for number in range(16)])
    assert Counter(each.code for each in answers) == {"invalid_credentials": 5, "account_locked": 11}
    third = open_door(await make_kit(plugins=[]))
    assert (await third.login("ann@example.org")).code == "account_locked"
    rescue = second.kernel.container.get(AccountRecovery)
    user = (await second.as_user("admin")).user
    await second.kernel.database.work(lambda: rescue.unlock(_id_of(second, "ann@example.org")))
    assert user
    assert (await third.login("ann@example.org")).status == 200


def _id_of(kit: Kit, email: str) -> str:
    from corral_core.accounts.api import Accounts

    found = kit.kernel.container.get(Accounts).find(email)
    assert found is not None
    return found.id


async def test_what_a_dead_process_had_reserved_is_free_again(kit: Kit, door: Any) -> None:
    await kit.as_user(email="ann@example.org")
    lockout, work = kit.kernel.container.get(Lockout), kit.kernel.database.work
    for _ in range(5):
        assert await work(lambda: lockout._reserve(_key()))
    assert not await work(lambda: lockout._reserve(_key()))
    began = time.monotonic()
    async with within(15):
        busy = await door.login("ann@example.org")
    assert (busy.status, busy.code) == (429, "concurrency_limit")
    assert time.monotonic() - began > 4
    clock.travel(HELD_SECONDS + 1)
    assert (await door.login("ann@example.org")).status == 200


def _key() -> str:
    from corral.crypto import digest

    return digest("ann@example.org")


async def test_a_full_pool_uses_no_attempt_up(kit: Kit, door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    await kit.as_user(email="ann@example.org")
    monkeypatch.setattr(passwords_module, "QUEUE_LIMIT", -1000)
    for _ in range(8):
        assert (await door.login("ann@example.org")).code == "overloaded"
    monkeypatch.undo()
    assert (await door.login("ann@example.org")).status == 200


async def test_every_check_of_a_password_counts(kit: Kit, door: Any) -> None:
    client = await kit.as_user(email="ann@example.org")
    change = {"current_password": WRONG, "new_password": WRONG}
    for path, body in (
        ("change-password", change),
        ("reauth", {"password": WRONG}),
        ("mfa/setup", {"password": WRONG}),
    ):
        assert (await client.post(f"/auth/{path}", body)).code == "invalid_credentials"
    assert (await client.put("/auth/me", {"email": "x@example.org", "current_password": WRONG})).status == 401
    rescue = kit.kernel.container.get(AccountRecovery)
    attempts = await kit.kernel.database.work(lambda: rescue.failed_attempts(["ann@example.org", "b@c"]), read=True)
    assert attempts == {"ann@example.org": 4}
    assert (await client.post("/auth/reauth", {"password": WRONG})).status == 401
    assert (await client.post("/auth/reauth", {"password": PASSWORD})).code == "account_locked"


async def test_wrong_activation_codes_count(kit: Kit, door: Any) -> None:
    client = await kit.as_user(email="ann@example.org")
    app = AuthenticatorApp((await client.post("/auth/mfa/setup")).json()["secret"])
    answers = [await client.post("/auth/mfa/verify", {"code": app.wrong()}) for _ in range(7)]
    assert [answer.code for answer in answers] == ["invalid_credentials"] * 5 + ["account_locked"] * 2
    assert (await client.post("/auth/mfa/verify", {"code": app.code()})).code == "account_locked"
    assert (await door.login("ann@example.org")).code == "account_locked"
    clock.travel(901)
    client = await kit.sign_in("ann@example.org")
    app = AuthenticatorApp((await client.post("/auth/mfa/setup")).json()["secret"])
    assert (await client.post("/auth/mfa/verify", {"code": app.code()})).status == 200


async def test_an_activation_forgets_no_failure(kit: Kit, door: Any) -> None:
    client = await kit.as_user(email="ann@example.org")
    await _fail(door, "ann@example.org", 4)
    app = AuthenticatorApp((await client.post("/auth/mfa/setup")).json()["secret"])
    assert (await client.post("/auth/mfa/verify", {"code": app.code()})).status == 200
    assert (await door.login("ann@example.org", WRONG)).code == "invalid_credentials"
    assert (await door.login("ann@example.org")).code == "account_locked"


async def test_addresses_that_nobody_tries_are_forgotten(kit: Kit, door: Any) -> None:
    await _fail(door, "ann@example.org", 2)
    work = kit.kernel.database.work
    assert await work(delete_old_lockouts) == 0
    rows = await work(lambda: str(list(LockoutRow.select().dicts())), read=True)
    assert "ann" not in rows
    clock.travel(2 * 86_400 + 61)
    assert await work(delete_old_lockouts) == 1


async def test_auth_4_known_and_unknown_addresses_take_the_same_time(kit: Kit, door: Any) -> None:
    """In small here, generous against a busy machine; promise S5 has the figure."""
    for number in range(12):
        await kit.as_user(email=f"known{number}@example.org")
    took: dict[bool, list[float]] = {True: [], False: []}
    for number in range(48):
        known = number % 2 == 0
        email = f"{'known' if known else 'nobody'}{number // 4}@example.org"
        began = time.perf_counter()
        assert (await door.login(email, WRONG)).status == 401
        took[known].append(time.perf_counter() - began)
    one, other = (statistics.quantiles(each, n=4)[0] for each in took.values())  # the undisturbed ones
    assert abs(one - other) / max(one, other) < 0.5


@pytest.mark.one_engine
async def test_the_holder_is_told_at_the_address_as_it_is_kept(make_kit: MakeKit, open_door: Any) -> None:
    kit = await make_kit(plugins=[], config={"settings.mail.host": "mail.example.org"})
    await kit.as_user(email="ann@strasse.example")
    await _fail(open_door(kit), "ann@stra\u00dfe.example", 5)  # one normal form, but another domain
    mails = await kit.kernel.database.work(
        lambda: [row.arguments for row in JobRow.select().where(JobRow.name == "accounts.send_mail")], read=True
    )
    assert [(mail["kind"], mail["to"]) for mail in mails] == [("locked", "ann@strasse.example")]
