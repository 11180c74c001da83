"""Refresh tokens: one successor whatever the race, and a family that ends when one comes back late."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from corral import clock
from corral.plugin import Settings
from corral.testing.kit import PASSWORD, Answer, Kit
from corral_core.accounts.jobs import erase_token_successors
from corral_core.accounts.models import RefreshRow

MakeKit = Callable[..., Awaitable[Kit]]


@pytest.fixture
async def kit(make_kit: MakeKit) -> Kit:
    return await make_kit(plugins=[])


async def _login(kit: Kit) -> dict[str, Any]:
    client = await kit.as_user()
    answer = await kit.client.post("/auth/login", {"email": client.user["email"], "password": PASSWORD})
    found: dict[str, Any] = answer.json()
    return found


async def _refresh(kit: Kit, token: str) -> Answer:
    return await kit.client.post("/auth/refresh", {"refresh_token": token})


async def test_auth_2_parallel_refreshes_leave_one_successor(kit: Kit, long_form: bool) -> None:
    token = (await _login(kit))["refresh_token"]
    for _ in range(1000 if long_form else 4):
        answers = await asyncio.gather(*[_refresh(kit, token) for _ in range(50)])
        assert {each.status for each in answers} == {200}
        successors = {each.json()["refresh_token"] for each in answers}
        assert len(successors) == 1
        token = successors.pop()
    unused = await kit.kernel.database.work(
        lambda: RefreshRow.select().where(RefreshRow.used_at.is_null()).count(), read=True
    )
    assert unused == 2  # of this session, and of the one that made the user


async def test_within_the_grace_a_lost_answer_costs_nothing(kit: Kit) -> None:
    first = (await _login(kit))["refresh_token"]
    second = (await _refresh(kit, first)).json()["refresh_token"]
    clock.travel(9)
    assert (await _refresh(kit, first)).json()["refresh_token"] == second
    assert (await _refresh(kit, second)).status == 200


async def test_reuse_after_the_grace_ends_the_family(kit: Kit) -> None:
    signed_in = await _login(kit)
    first = signed_in["refresh_token"]
    second = (await _refresh(kit, first)).json()
    clock.travel(11)
    stolen = await _refresh(kit, first)
    assert (stolen.status, stolen.code) == (401, "token_reuse")
    assert (await _refresh(kit, second["refresh_token"])).code == "session_revoked"
    assert (await _refresh(kit, first)).code == "session_revoked"
    kit.client.token = second["access_token"]
    assert (await kit.client.get("/auth/me")).code == "session_revoked"
    ended = [each.payload() for each in await kit.events() if each.type == "session.ended"]
    assert [each["reason"] for each in ended] == ["reuse"]


async def test_a_grace_of_nothing_forgives_nothing(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[], environ={"CORRAL_REFRESH_GRACE": "0"})
    first = (await _login(kit))["refresh_token"]
    assert (await _refresh(kit, first)).status == 200
    assert (await _refresh(kit, first)).code == "token_reuse"


async def test_successors_are_sealed_and_forgotten_after_the_grace(kit: Kit) -> None:
    first = (await _login(kit))["refresh_token"]
    second = (await _refresh(kit, first)).json()["refresh_token"]
    work, settings = kit.kernel.database.work, kit.kernel.container.get(Settings)

    def kept() -> list[str | None]:
        return [row.successor for row in RefreshRow.select().where(RefreshRow.successor.is_null(False))]

    assert len(await work(kept, read=True)) == 1
    rows = await work(lambda: str(list(RefreshRow.select().dicts())), read=True)
    assert first not in rows
    assert second not in rows
    await erase_token_successors(work, settings)
    assert len(await work(kept, read=True)) == 1
    clock.travel(11)
    await erase_token_successors(work, settings)
    assert await work(kept, read=True) == []


@pytest.mark.one_engine
@pytest.mark.parametrize("token", ["unknown", "x" * 200, "é"])
async def test_an_unknown_token_is_of_no_session(kit: Kit, token: str) -> None:
    assert (await _refresh(kit, token)).code == "session_revoked"
