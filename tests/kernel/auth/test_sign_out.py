"""Signing out: with any token of the session, expired or not, as often as one likes, and for the whole session."""

from __future__ import annotations

from typing import Any

import pytest

from corral import clock
from corral.testing.kit import Answer, Kit


async def logout(kit: Kit, body: Any = None, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await kit.client.post("/auth/logout", body, headers=named)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def refresh(kit: Kit, token: str) -> Answer:
    return await kit.client.post("/auth/refresh", {"refresh_token": token})


async def test_an_expired_access_token_ends_its_session(kit: Kit, door: Any) -> None:
    member = await kit.as_user()
    tokens = (await door.login(member.user["email"])).json()
    renewed = (await refresh(kit, tokens["refresh_token"])).json()
    clock.travel(3600)
    assert (await kit.client.get("/auth/me", headers=bearer(tokens["access_token"]))).code == "token_expired"
    for _ in range(2):  # it is repeatable
        assert (await logout(kit, **bearer(tokens["access_token"]))).status == 204
    assert (await refresh(kit, renewed["refresh_token"])).code == "session_revoked"


async def test_a_refresh_token_ends_its_whole_chain(kit: Kit, door: Any) -> None:
    member = await kit.as_user()
    first = (await door.login(member.user["email"])).json()
    second = (await refresh(kit, first["refresh_token"])).json()
    other = (await door.login(member.user["email"])).json()
    for token in (first["refresh_token"], second["refresh_token"]):  # used, and unused
        assert (await logout(kit, {"refresh_token": token})).status == 204
    assert (await kit.client.get("/auth/me", headers=bearer(second["access_token"]))).code == "session_revoked"
    assert (await refresh(kit, second["refresh_token"])).code == "session_revoked"
    assert (await refresh(kit, other["refresh_token"])).status == 200
    unknown = await logout(kit, {"refresh_token": "x" * 43})
    assert (unknown.status, unknown.code) == (401, "unauthenticated")


@pytest.mark.one_engine
async def test_the_cookie_ends_its_session_for_pages_of_this_host(kit: Kit, door: Any) -> None:
    member = await kit.as_user()
    answer = await door.login(member.user["email"], cookie=True)
    cookie = answer.headers["set-cookie"].partition(";")[0]
    for origin in ({}, {"origin": "https://evil.example"}):
        assert (await logout(kit, cookie=cookie, **origin)).code == "forbidden"
    assert (await kit.client.get("/auth/me", headers=bearer(answer.json()["access_token"]))).status == 200
    for _ in range(2):
        gone = await logout(kit, cookie=cookie, origin="http://localhost")
        assert (gone.status, "Max-Age=0" in gone.headers["set-cookie"]) == (204, True)
    assert (await kit.client.get("/auth/me", headers=bearer(answer.json()["access_token"]))).code == "session_revoked"


@pytest.mark.one_engine
async def test_what_is_no_token_of_a_session_is_refused(kit: Kit, door: Any) -> None:
    member = await kit.as_user()
    tokens = (await door.login(member.user["email"])).json()
    head, body, signature = tokens["access_token"].split(".")
    forged = f"{head}.{body}.{signature[::-1]}"
    for headers in ({}, bearer(forged), bearer("x"), bearer(tokens["refresh_token"]), {"x-api-key": ""}):
        answer = await logout(kit, **headers)
        assert (answer.status, answer.code) == (401, "unauthenticated"), headers
        assert answer.json()["title"] == "A valid credential is required"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    both = await logout(kit, {"refresh_token": tokens["refresh_token"]}, **bearer(forged))
    assert both.status == 401
    assert (await kit.client.get("/auth/me", headers=bearer(tokens["access_token"]))).status == 200
