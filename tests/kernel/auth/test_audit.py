"""What signing in leaves in the audit log: every change and every failure, and never a secret."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral.testing.kit import PASSWORD, Kit

MakeKit = Callable[..., Awaitable[Kit]]
WRONG = "an entirely other phrase"


@pytest.fixture
async def kit(make_kit: MakeKit) -> Kit:
    return await make_kit(plugins=["audit"])


async def _rows(client: Any) -> list[dict[str, Any]]:
    """Rows of the log, oldest first."""
    answer = await client.get("/admin/audit?action=auth.*&limit=200")
    assert answer.status == 200, answer
    items: list[dict[str, Any]] = answer.json()["items"]
    return items[::-1]


@pytest.mark.one_engine
async def test_every_step_of_signing_in_is_written_down(kit: Kit, door: Any) -> None:
    auditor = await kit.as_user("auditor")
    user, app, codes = await door.with_mfa(email="ann@example.org")
    clock.travel(60)
    signed_in = await door.login("ann@example.org", mfa_code=app.code())
    for proof in ({"mfa_code": app.wrong()}, {}):
        await door.login("ann@example.org", WRONG if not proof else PASSWORD, **proof)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    assert (await door.challenge(token, recovery_code=codes[0])).status == 200
    assert (await user.post("/auth/reauth", {"password": PASSWORD})).status == 200
    change = {"current_password": PASSWORD, "new_password": WRONG}
    assert (await user.post("/auth/change-password", change)).status == 200
    await user.post("/auth/mfa/disable", {"password": WRONG, "recovery_code": codes[1]})
    for _ in range(5):
        await door.login("ann@example.org", PASSWORD)
    await user.post("/auth/logout")
    rows = await _rows(auditor)
    mine = [row for row in rows if row["actor"]["id"] != auditor.user["id"]]
    actions = [row["action"] for row in mine]
    for action in (
        "auth.mfa.setup",
        "auth.mfa.enable",
        "auth.mfa.recovery_codes",
        "auth.mfa.recover",
        "auth.mfa.disable",
        "auth.session.step_up",
        "auth.password.change",
        "auth.session.end",
        "auth.user.lock",
    ):
        assert action in actions, (action, actions)
    failed = [row for row in mine if row["outcome"] == "failed"]
    assert [row["code"] for row in failed] == ["invalid_credentials"] * 7
    assert {row["actor"]["type"] for row in failed} == {"anonymous"}
    assert {row["object"]["id"] for row in failed} == {user.user["id"]}
    text = str(rows)
    for secret in (PASSWORD, WRONG, token, *codes, signed_in.json()["refresh_token"]):
        assert secret not in text


@pytest.mark.one_engine
async def test_a_token_that_comes_back_is_written_down(kit: Kit, door: Any) -> None:
    auditor = await kit.as_user("auditor")
    await kit.as_user(email="ann@example.org")
    first = {"refresh_token": (await door.login("ann@example.org")).json()["refresh_token"]}
    assert (await kit.client.post("/auth/refresh", first)).status == 200
    clock.travel(11)
    assert (await kit.client.post("/auth/refresh", first)).code == "token_reuse"
    found = [row for row in await _rows(auditor) if row["action"] == "auth.refresh_reuse"]
    assert [(row["outcome"], row["code"]) for row in found] == [("failed", "token_reuse")]
    alerts = [event.payload() for event in await kit.events() if event.type == "system.alert"]
    assert [(each["kind"], each["severity"], each["object"]["type"]) for each in alerts] == [
        ("refresh_reuse", "warning", "session")
    ]
    assert (await kit.client.post("/auth/refresh", first)).status == 401  # the session has ended: no alert again
    assert [event.type for event in await kit.events()].count("system.alert") == 1


@pytest.mark.one_engine
async def test_an_unknown_address_is_told_apart_from_others_and_not_written_down(kit: Kit, door: Any) -> None:
    auditor = await kit.as_user("auditor")
    typed = ("  NOBODY@example.org", "nobody@EXAMPLE.org", "a password in the wrong field")
    for text in typed:
        await door.login(text, WRONG)
    rows = (await _rows(auditor))[-3:]
    assert {(row["outcome"], row["object"]["id"]) for row in rows} == {("failed", None)}
    first, same, other = [row["details"]["address"] for row in rows]
    assert first == same != other
    assert not any(text.strip().lower() in str(rows).lower() for text in typed)


@pytest.mark.one_engine
async def test_of_a_known_address_the_account_is_written_down_alone(kit: Kit, door: Any) -> None:
    auditor, ann = await kit.as_user("auditor"), await kit.as_user(email="ann@example.org")
    await door.login("ANN@example.org", WRONG)
    row = (await _rows(auditor))[-1]
    assert (row["outcome"], row["object"]["id"], row["details"]) == ("failed", ann.user["id"], {})


async def test_sign_ins_of_a_locked_address_are_written_down_once_a_minute(kit: Kit, door: Any) -> None:
    auditor, ann = await kit.as_user("auditor"), await kit.as_user(email="ann@example.org")
    for email in ("ann@example.org", "nobody@example.org"):
        for _ in range(5):
            assert (await door.login(email, WRONG)).code == "invalid_credentials"
        for _ in range(4):
            assert (await door.login(email, PASSWORD)).code == "account_locked"
    await ann.post("/auth/reauth", {"password": PASSWORD})
    denied = [row for row in await _rows(auditor) if row["outcome"] == "denied"]
    assert {row["code"] for row in denied} == {"account_locked"}
    assert [(row["action"], row["actor"]["id"], row["object"]["id"]) for row in denied] == [
        ("auth.session.create", None, ann.user["id"]),
        ("auth.session.create", None, None),
        ("auth.user.verify", ann.user["id"], ann.user["id"]),
    ]
    assert "nobody@example.org" not in str(denied)


@pytest.mark.one_engine
async def test_a_right_password_of_an_address_that_is_not_verified_is_written_down(
    make_kit: MakeKit, open_door: Any
) -> None:
    verifying = {"settings.mail.host": "mail.example.org", "settings.security.email_verification": True}
    verifying |= {"settings.security.registration": "open"}
    kit = await make_kit(plugins=["audit"], config=verifying)
    auditor = await kit.as_user("auditor")
    new = {"email": "ann@example.org", "password": PASSWORD, "full_name": "Ann"}
    assert (await kit.client.post("/auth/register", new)).status == 202
    for _ in range(3):
        assert (await open_door(kit).login("ann@example.org")).code == "email_unverified"
    rows = [row for row in await _rows(auditor) if row["action"] == "auth.session.create"]
    assert [(row["outcome"], row["code"]) for row in rows if row["outcome"] != "success"] == [
        ("denied", "email_unverified")
    ]
