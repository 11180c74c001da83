"""A sign-in under way while its password is replaced, or its account switched off: nothing of it stays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.engines import POSTGRES
from tests.rival import Rival

from corral.testing.kit import PASSWORD, Answer, Kit
from corral_core.accounts.api import Accounts, PasswordLinks, UserPatch
from corral_core.accounts.models import LinkRow
from corral_core.accounts.service.links import CHANGE_EMAIL
from corral_core.accounts.service.own_account import ProfileChanges
from corral_core.accounts.service.sign_in import SignIn

LONG_ENOUGH = 0.7  # for a change that waits for nobody


class Meeting:
    """Holds whom the password let in before they do what they came for, until the change is done or waits."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, where: type[Any] = SignIn, step: str = "create_session"
    ) -> None:
        self.begun, self._changed, real = threading.Event(), threading.Event(), getattr(where, step)

        def slow(*given: Any) -> Any:
            self.begun.set()
            self._changed.wait(LONG_ENOUGH)
            return real(*given)

        monkeypatch.setattr(where, step, slow)

    async def of(self, request: Awaitable[Answer], change: Callable[[], Any], kit: Kit) -> Answer:
        """Let both happen at once: what the request is answered."""
        requested = asyncio.ensure_future(request)
        assert await asyncio.to_thread(self.begun.wait, 10)
        await kit.kernel.database.work(change)
        self._changed.set()
        return await requested


def _changes(kit: Kit, user_id: str) -> dict[str, Callable[[], Any]]:
    accounts, links = kit.kernel.container.get(Accounts), kit.kernel.container.get(PasswordLinks)
    return {
        "set_password": lambda: accounts.set_password(user_id, "another hash"),
        "reset": lambda: links.create_reset_link(user_id),
        "deactivate": lambda: accounts.update(user_id, UserPatch(is_active=False)),
    }


async def _let_in_again(kit: Kit, user_id: str) -> None:
    """Whoever was switched off is switched on: what is refused from here on was ended."""
    accounts = kit.kernel.container.get(Accounts)
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


async def test_no_move_to_another_address_outlives_what_it_proved(
    make_kit: Callable[..., Awaitable[Kit]], monkeypatch: pytest.MonkeyPatch
) -> None:
    verifying = {"settings.mail.host": "mail.example.org", "settings.security.email_verification": True}
    kit = await make_kit(plugins=[], config=verifying)
    client = await kit.as_user(email="ann@example.org")
    meeting = Meeting(monkeypatch, ProfileChanges, "_request_address_change")
    moving = client.put("/auth/me", {"email": "thief@example.org", "current_password": PASSWORD})
    await meeting.of(moving, _changes(kit, client.user["id"])["reset"], kit)
    live = (LinkRow.kind == CHANGE_EMAIL) & LinkRow.used_at.is_null()
    assert not await kit.kernel.database.work(LinkRow.select().where(live).exists, read=True)


@POSTGRES
async def test_a_link_signs_nobody_in_who_is_deactivated_meanwhile(
    make_kit: Callable[..., Any], database_url: str
) -> None:
    kit = await make_kit(plugins=["admin"])
    admin, ada = await kit.as_user("admin"), await kit.as_user("member", "ada@example.org")
    url = (await admin.post(f"/admin/users/{ada.user['id']}/reset-password")).json()["reset_url"]
    rival, end = Rival(database_url), "UPDATE accounts_users SET is_active = false, version = version + 1 WHERE id = %s"
    body = {"token": url.partition("#token=")[2], "new_password": "another rather long phrase"}
    answer = await rival.before(kit.client.post("/auth/reset-password", body), end, ada.user["id"])
    rival.close()
    assert (answer.status, answer.code) == (410, "link_expired"), answer
