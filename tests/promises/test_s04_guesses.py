"""S4: guesses in parallel, in every spelling, with forged client addresses, over two processes: at most five are
verified an account in 15 minutes, and at most five codes an `mfa_token`.

What was verified is told by the servers' own count of hashes. Short form: 400 guesses; long form (`--long`): 10,000.
"""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.kernel.auth.authenticator import AuthenticatorApp

from corral.testing.server import PASSWORD, ServerProcess

pytestmark = pytest.mark.one_engine

ACCOUNTS, THREADS, ALLOWED = 4, 32, 5
HASHES = re.compile(r"^corral_password_hash_seconds_count (\d+)", re.MULTILINE)


def wide(text: str) -> str:
    return "".join(chr(ord(letter) + 0xFEE0) if letter.isalpha() else letter for letter in text)


SPELLINGS = (str.lower, str.upper, str.title, wide, lambda text: f"  {text}", lambda text: f"{text}\u00a0")


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[ServerProcess]:
    arguments = ("--processes", "2", "--no-embedded-worker")
    environ = {"CORRAL_REGISTRATION": "open"}
    with ServerProcess(tmp_path, database_url=database_url, arguments=arguments, environ=environ) as server:
        yield server


def hashes(server: ServerProcess) -> int:
    """How many passwords all processes have hashed. Processes that are busy may be missing from a sum."""
    sums: list[int] = []
    for _ in range(40):
        text = httpx2.get(f"{server.address}/metrics", trust_env=False).text
        sums += [int(found[1]) for found in HASHES.finditer(text)]
        if len(sums) == 5:
            return max(sums)
        time.sleep(0.4)
    raise AssertionError(text[:500])


def register(server: ServerProcess, email: str) -> None:
    with server.client() as client:
        body = {"email": email, "password": PASSWORD, "full_name": "Somebody"}
        client.post("/auth/register", json=body).raise_for_status()


class Guessing:
    """Sends one request after the other from many threads, each with a client of its own."""

    def __init__(self, server: ServerProcess) -> None:
        self.server, self._own = server, threading.local()

    def __call__(self, path: str, body: dict[str, Any], number: int) -> str:
        if number % 50 == 0 or not hasattr(self._own, "client"):  # a new connection may reach the other process
            self._own.client = self.server.client()
        address = f"203.0.{number % 250}.{number % 7}"
        headers = {"X-Forwarded-For": address, "X-Real-IP": address, "Forwarded": f"for={address}"}
        answer = self._own.client.post(path, json=body, headers=headers)
        return "success" if answer.status_code == 200 else str(answer.json()["code"])


def test_s4_guesses_of_passwords(server: ServerProcess, long_form: bool, figure: Any) -> None:
    emails = [f"victim{number}@example.org" for number in range(ACCOUNTS)]
    for email in emails:
        register(server, email)
    before = hashes(server)
    guess, pick = Guessing(server), random.Random(7)
    count = 10_000 if long_form else 400
    bodies = [
        {"email": pick.choice(SPELLINGS)(emails[number % ACCOUNTS]), "password": f"a guess that is wrong {number}"}
        for number in range(count)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        codes = Counter(pool.map(guess, itertools.repeat("/auth/login"), bodies, range(count)))
    verified = hashes(server) - before
    figure("S4", {"guesses": count, "accounts": ACCOUNTS, "verified": verified, "answers": dict(codes)})
    assert set(codes) <= {"invalid_credentials", "account_locked", "concurrency_limit"}
    assert verified == codes["invalid_credentials"] == ALLOWED * ACCOUNTS
    for email in emails:  # the right password, too
        assert guess("/auth/login", {"email": email, "password": PASSWORD}, 1) == "account_locked"


def test_s4_guesses_of_codes(server: ServerProcess, long_form: bool) -> None:
    register(server, "victim@example.org")
    with server.sign_in("victim@example.org") as client:
        app = AuthenticatorApp(client.post("/auth/mfa/setup").raise_for_status().json()["secret"])
        client.post("/auth/mfa/verify", json={"code": app.code()}).raise_for_status()
    guess = Guessing(server)
    with server.client() as client:
        body = {"email": "victim@example.org", "password": PASSWORD}
        tokens = [client.post("/auth/login", json=body).raise_for_status().json()["mfa_token"] for _ in range(3)]
    near = {app.code(steps) for steps in range(-10, 40)}
    wrong = [code for number in range(2000 if long_form else 200) if (code := f"{number:06d}") not in near]
    bodies = [{"mfa_token": tokens[number % 3], "code": code} for number, code in enumerate(wrong)]
    with ThreadPoolExecutor(THREADS) as pool:
        codes = Counter(pool.map(guess, itertools.repeat("/auth/mfa/challenge"), bodies, range(len(bodies))))
    assert codes["invalid_credentials"] == ALLOWED  # of all tokens together: codes count as failures of the account
    assert set(codes) <= {"invalid_credentials", "account_locked", "token_expired", "concurrency_limit"}
    assert guess("/auth/mfa/challenge", {"mfa_token": tokens[0], "code": app.code(1)}, 1) != "success"
