"""A seed that was changed where it is stored: its owner is told so, with the ways out, and nobody else notices."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral.testing.kit import PASSWORD, Kit
from corral_core.accounts.models import SecondFactorRow

pytestmark = pytest.mark.one_engine

MakeKit = Callable[..., Awaitable[Kit]]
CODE = "core.second_factor_damaged"


def _cut(sealed: str) -> str:
    return sealed[:40]


def _altered(sealed: str) -> str:
    return sealed[:-1] + ("0" if sealed[-1] != "0" else "1")


def _no_hex(sealed: str) -> str:
    return "?" + sealed[1:]


async def _damage(kit: Kit, user_id: str, how: Callable[[str], str]) -> None:
    def unit() -> None:
        row = SecondFactorRow.get(SecondFactorRow.user_id == user_id)
        SecondFactorRow.update(seed=how(row.seed)).where(SecondFactorRow.user_id == user_id).execute()

    await kit.kernel.database.work(unit)


@pytest.mark.parametrize("how", [_cut, _altered, _no_hex])
async def test_a_damaged_seed_is_told_and_leaves_the_ways_out(
    kit: Kit, door: Any, caplog: pytest.LogCaptureFixture, how: Callable[[str], str]
) -> None:
    ann, app, codes = await door.with_mfa(email="ann@example.org")
    _, other, _ = await door.with_mfa(email="bob@example.org")
    clock.travel(60)
    await _damage(kit, ann.user["id"], how)
    token = (await door.login("ann@example.org")).json()["mfa_token"]
    for _ in range(6):  # no code was wrong: it locks nothing and ends no `mfa_token`
        answers = [
            await door.challenge(token, code=app.code()),
            await door.login("ann@example.org", mfa_code=app.code()),
            await ann.post("/auth/reauth", {"code": app.code()}),
            await ann.post("/auth/mfa/recovery-codes", {"password": PASSWORD, "code": app.code()}),
            await ann.post("/auth/mfa/disable", {"password": PASSWORD, "code": app.code()}),
        ]
        assert [(each.status, each.code) for each in answers] == [(409, CODE)] * 5
    detail = answers[0].json()["detail"]
    assert "recovery code" in detail
    assert "corral user reset-mfa" in detail
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 30
    assert all("corral user reset-mfa" in record.getMessage() for record in told)
    assert all(ann.user["id"] in record.getMessage() for record in told)
    assert (await door.login("bob@example.org", mfa_code=other.code())).status == 200
    assert (await door.challenge(token, recovery_code=codes[0])).status == 200
    off = await ann.post("/auth/mfa/disable", {"password": PASSWORD, "recovery_code": codes[1]})
    assert (off.status, off.json()["mfa_enabled"]) == (200, False)


async def test_an_admin_takes_a_damaged_seed_away_and_the_log_has_it_as_what_it_is(
    make_kit: MakeKit, open_door: Any
) -> None:
    kit = await make_kit(plugins=["admin", "audit"])
    door = open_door(kit)
    admin = await kit.as_user("admin")
    ann, app, _ = await door.with_mfa(email="ann@example.org")
    clock.travel(60)
    await _damage(kit, ann.user["id"], _cut)
    assert (await door.login("ann@example.org", mfa_code=app.code())).code == CODE
    rows = (await admin.get("/admin/audit?action=auth.*&outcome=failed")).json()["items"]
    assert [(row["action"], row["code"], row["object"]["id"]) for row in rows] == [
        ("auth.session.create", CODE, ann.user["id"])
    ]
    assert (await admin.post("/auth/reauth", {"password": PASSWORD})).status == 200
    assert (await admin.post(f"/admin/users/{ann.user['id']}/reset-mfa")).status == 200
    assert "access_token" in (await door.login("ann@example.org")).json()


async def test_a_damaged_setup_is_begun_anew(kit: Kit) -> None:
    ann = await kit.as_user(email="ann@example.org")
    await ann.post("/auth/mfa/setup")
    await _damage(kit, ann.user["id"], _altered)
    answer = await ann.post("/auth/mfa/verify", {"code": "123456"})
    assert (answer.status, answer.code) == (409, CODE)
    assert "/auth/mfa/setup" in answer.json()["detail"]
    assert (await ann.post("/auth/mfa/setup")).status == 200
