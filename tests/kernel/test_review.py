"""What callers of one address must not learn of each other, and instants at the edge of the calendar."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone

from corral import clock
from corral.testing.kit import PASSWORD, Kit


async def test_a_stored_refresh_is_for_its_cookie_alone(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=[])
    cookies = []
    for _ in range(2):
        person = await kit.as_user("member")
        body = {"email": person.user["email"], "password": PASSWORD, "cookie": True}
        cookies.append((await kit.client.post("/auth/login", body)).headers["set-cookie"].partition(";")[0])
    headers = {"Idempotency-Key": "refresh", "Origin": "http://localhost"}
    first = await kit.client.post("/auth/refresh", headers={**headers, "Cookie": cookies[0]})
    second = await kit.client.post("/auth/refresh", headers={**headers, "Cookie": cookies[1]})
    nobody = await kit.client.post("/auth/refresh", headers=headers)
    assert (first.status, second.status, nobody.status) == (200, 200, 422)
    assert first.json()["user"]["id"] != second.json()["user"]["id"]
    again = await kit.client.post("/auth/refresh", headers={**headers, "Cookie": cookies[0]})
    assert again.headers["idempotency-replayed"] == "true"
    assert again.body == first.body


def test_instants_beyond_the_calendar_are_its_ends() -> None:
    far_west, far_east = timezone(timedelta(hours=-14)), timezone(timedelta(hours=14))
    assert clock.from_datetime(datetime(9999, 12, 31, 23, 59, tzinfo=far_west)) == clock.LAST
    assert clock.from_datetime(datetime(1, 1, 1, tzinfo=far_east)) == clock.FIRST
    assert clock.format_instant(clock.parse_instant(clock.LAST) + 1) == clock.LAST
    assert clock.format_instant(clock.parse_instant(clock.LAST)) == clock.LAST
    assert clock.format_instant(clock.parse_instant(clock.FIRST)) == clock.FIRST
    assert clock.format_instant(clock.parse_instant(clock.FIRST) - 1) == clock.FIRST


async def test_a_length_that_no_body_has_is_no_bug(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=[])
    answer = await kit.client.post("/auth/login", {}, headers={"Content-Length": "9" * 5000})
    assert (answer.status, answer.code) == (400, "malformed_request")
