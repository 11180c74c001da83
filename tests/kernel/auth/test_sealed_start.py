"""A start without the right master key lets people sign in, for as long as it runs."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.kernel.auth.authenticator import AuthenticatorApp
from tests.kernel.auth.conftest import Door
from tests.kernel.cli.conftest import Command

from corral import clock
from corral.cli.saved_sessions import SavedSessions
from corral.testing.kit import PASSWORD, Client, Kit
from corral.testing.server import serving

MakeKit = Callable[..., Awaitable[Kit]]
RIGHT, WRONG = (f"v1:{base64.b64encode(bytes(range(at, at + 32))).decode()}" for at in (0, 100))


async def test_people_sign_in_to_a_sealed_installation(make_kit: MakeKit, open_door: Callable[[Kit], Door]) -> None:
    kit = await make_kit(plugins=[], environ={"CORRAL_MASTER_KEY": RIGHT})
    door = open_door(kit)
    await kit.as_user("admin", "ann@example.org")
    _, app, codes = await door.with_mfa("admin", "bob@example.org")
    earlier = await door.login("ann@example.org")
    for key in (WRONG, None):
        sealed = await make_kit(plugins=[], environ={"CORRAL_MASTER_KEY": key} if key else {})
        assert sealed.kernel.keyring.sealed
        door = open_door(sealed)
        answer = await door.login("ann@example.org", cookie=True)
        assert "refresh_token" not in answer.json(), answer
        assert "set-cookie" not in answer.headers
        ann = door.client(answer)
        me = (await ann.get("/auth/me")).json()
        assert me["session"]["expires_at"] <= _minutes_after(me["session"]["created_at"], 16)
        assert (await ann.post("/auth/reauth", {"password": PASSWORD})).status == 200
        held = await sealed.client.get(
            "/auth/me", headers={"Authorization": f"Bearer {earlier.json()['access_token']}"}
        )
        assert (held.status, held.code) == (503, "vault_sealed")  # other machines may know its key
        refreshed = await sealed.client.post("/auth/refresh", {"refresh_token": earlier.json()["refresh_token"]})
        assert (refreshed.status, refreshed.code) == (503, "vault_sealed")
        assert (await ann.post("/auth/mfa/setup")).code == "vault_sealed"
        await _second_factor(door, app, codes)
        assert (await ann.post("/auth/logout")).status == 204
        assert (await ann.get("/auth/me")).code == "session_revoked"
        later = door.client(await door.login("ann@example.org"))
    again = await make_kit(plugins=[], environ={"CORRAL_MASTER_KEY": RIGHT})
    unknown = await again.client.get("/auth/me", headers={"Authorization": f"Bearer {later.token}"})
    assert (unknown.status, unknown.code) == (401, "unauthenticated")
    fresh = await again.client.post("/auth/refresh", {"refresh_token": earlier.json()["refresh_token"]})
    assert fresh.status == 200


@pytest.mark.one_engine
async def test_the_command_line_signs_in_for_a_quarter_of_an_hour(make_kit: MakeKit, tmp_path: Path) -> None:
    kit = await make_kit(plugins=[], environ={"CORRAL_MASTER_KEY": RIGHT})
    await kit.as_user("admin", "ann@example.org")
    sealed = await make_kit(plugins=[], environ={"CORRAL_MASTER_KEY": WRONG})
    corral = Command(tmp_path)
    corral.environ["XDG_CONFIG_HOME"] = str(tmp_path)
    async with serving(sealed) as port:
        url = f"http://127.0.0.1:{port}"
        password = ("--email", "ann@example.org", "--password-file", "-")
        done = await asyncio.to_thread(corral, "login", url, *password, stdin=PASSWORD)
        assert done.status == 0, done
        assert "the session cannot renew itself: it ends in 15 minutes" in done.out
        _, session = SavedSessions(tmp_path / "corral").find() or pytest.fail("not signed in")
        client = Client(sealed.application.app, session.token)
        assert (await client.get("/auth/me")).status == 200
        assert (await asyncio.to_thread(corral, "logout")).status == 0
        assert (await client.get("/auth/me")).code == "session_revoked"


async def _second_factor(door: Door, app: AuthenticatorApp, codes: list[str]) -> None:
    """A recovery code works, because only its hash is stored; a code of the app cannot be checked."""
    started = await door.login("bob@example.org")
    token = started.json()["mfa_token"]
    refused = await door.challenge(token, code=app.code())
    assert (refused.status, refused.code) == (503, "vault_sealed")
    bob = door.client(await door.challenge(token, recovery_code=codes.pop()))
    assert (await bob.get("/auth/me")).json()["session"]["mfa"] is True


def _minutes_after(instant: str, minutes: int) -> str:
    return clock.format_instant(clock.parse_instant(instant) + minutes * 60)
