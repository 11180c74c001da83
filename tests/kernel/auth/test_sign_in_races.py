"""A sign-in under way while its password is replaced, or its account switched off: nothing of it stays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral.core.api import Accounts, PasswordLinks, UserPatch
from corral.core.sign_in import SignIn
from corral.testing.kit import Answer, Kit

LONG_ENOUGH = 0.7  # for a change that waits for nobody


class Meeting:
    """Holds the sign-in between its look at the password and its new session, until the change is done or waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self._changed, real = threading.Event(), threading.Event(), SignIn.enter

        def slow(sign_in: SignIn, *given: Any) -> Any:
            self.begun.set()
            self._changed.wait(LONG_ENOUGH)
            return real(sign_in, *given)

        monkeypatch.setattr(SignIn, "enter", slow)

    async def of(self, sign_in: Awaitable[Answer], change: Callable[[], Any], kit: Kit) -> Answer:
        """Let both happen at once: what the sign-in answers."""
        signing_in = asyncio.ensure_future(sign_in)
        assert await asyncio.to_thread(self.begun.wait, 10)
        await kit.kernel.database.work(change)
        self._changed.set()
        return await signing_in


def _changes(kit: Kit, user_id: str) -> dict[str, Callable[[], Any]]:
    accounts, links = kit.kernel.container.get(Accounts), kit.kernel.container.get(PasswordLinks)  # type: ignore[type-abstract]
    return {
        "set_password": lambda: accounts.set_password(user_id, "another hash"),
        "reset": lambda: links.reset(user_id),
        "deactivate": lambda: accounts.update(user_id, UserPatch(is_active=False)),
    }


async def _let_in_again(kit: Kit, user_id: str) -> None:
    """Whoever was switched off is switched on: what is refused from here on was ended."""
    accounts = kit.kernel.container.get(Accounts)  # type: ignore[type-abstract]
    await kit.kernel.database.work(lambda: accounts.update(user_id, UserPatch(is_active=True)))


@pytest.mark.parametrize("how", ["set_password", "reset", "deactivate"])
async def test_no_session_of_a_sign_in_outlives_what_it_proved(
    kit: Kit, door: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    user_id = (await kit.as_user(email="ann@example.org")).user["id"]
    meeting = Meeting(monkeypatch)
    answer = await meeting.of(door.login("ann@example.org"), _changes(kit, user_id)[how], kit)
    await _let_in_again(kit, user_id)
    if answer.status == 200:
        assert (await door.client(answer).get("/auth/me")).code == "session_revoked"
        given = {"refresh_token": answer.json()["refresh_token"]}
        assert (await kit.client.post("/auth/refresh", given)).code == "session_revoked"
    else:
        assert answer.code == "invalid_credentials"


@pytest.mark.parametrize("how", ["set_password", "reset", "deactivate"])
async def test_no_challenge_of_a_sign_in_outlives_what_it_proved(
    kit: Kit, door: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    client, _, codes = await door.with_mfa(email="ann@example.org")
    meeting = Meeting(monkeypatch)
    answer = await meeting.of(door.login("ann@example.org"), _changes(kit, client.user["id"])[how], kit)
    await _let_in_again(kit, client.user["id"])
    if answer.status == 200:
        challenged = await door.challenge(answer.json()["mfa_token"], recovery_code=codes[0])
        assert challenged.code == "token_expired"
    else:
        assert answer.code == "invalid_credentials"
