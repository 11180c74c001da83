"""What callers of one address must not learn of each other, and instants at the edge of the calendar."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from corral import clock
from corral.http.idempotency import IdempotencyRow
from corral.testing.kit import PASSWORD, Kit, run_due_jobs


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


async def test_no_part_of_a_stored_sign_in_tells_its_credential(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=[])
    person = await kit.as_user("member")
    body = {"email": person.user["email"], "password": PASSWORD, "cookie": True}
    headers = {"Idempotency-Key": "sign-in"}
    first = await kit.client.post("/auth/login", body, headers=headers)
    token = first.headers["set-cookie"].partition(";")[0].partition("=")[2]
    row: Any  # the types of peewee do not say what dicts() makes
    [row] = await kit.kernel.database.work(lambda: list(IdempotencyRow.select().dicts()), read=True)
    assert row["sealed"]
    assert token not in repr(row)
    again = await kit.client.post("/auth/login", body, headers=headers)
    assert (again.status, again.body) == (first.status, first.body)
    assert again.headers["set-cookie"] == first.headers["set-cookie"]
    assert again.headers["idempotency-replayed"] == "true"


def test_instants_beyond_the_calendar_are_its_ends() -> None:
    far_west, far_east = timezone(timedelta(hours=-14)), timezone(timedelta(hours=14))
    assert clock.from_datetime(datetime(9999, 12, 31, 23, 59, tzinfo=far_west)) == clock.LAST
    assert clock.from_datetime(datetime(1, 1, 1, tzinfo=far_east)) == clock.FIRST
    assert clock.format_instant(clock.parse_instant(clock.LAST) + 1) == clock.LAST
    assert clock.format_instant(clock.parse_instant(clock.LAST)) == clock.LAST
    assert clock.format_instant(clock.parse_instant(clock.FIRST)) == clock.FIRST
    assert clock.format_instant(clock.parse_instant(clock.FIRST) - 1) == clock.FIRST


@pytest.mark.one_engine
async def test_a_length_that_no_body_has_is_no_bug(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    kit = await make_kit(plugins=[])
    answer = await kit.client.post("/auth/login", {}, headers={"Content-Length": "9" * 5000})
    assert (answer.status, answer.code) == (400, "malformed_request")


async def test_a_job_whose_process_dies_each_time_ends(kit: Kit) -> None:
    from corral import clock
    from corral.jobs.job import Job, JobRow
    from corral.jobs.runner import JobRunner

    ran: list[int] = []
    job = Job("test.deadly", lambda: ran.append(1), max_attempts=2, lease_seconds=5)
    runner = JobRunner(kit.kernel.database, redact=str)
    runner.add([job], [], lambda: True)
    row = {"id": "01890a5d-ac96-774b-bcce-b302099a8057", "name": "test.deadly", "state": "running", "attempts": 2}
    work = kit.kernel.database.work
    await work(lambda: JobRow.insert(**row, run_at=clock.now(-1), created_at=clock.now()).execute())
    assert await run_due_jobs(runner) == 0
    found = await work(lambda: JobRow.get_by_id(row["id"]), read=True)
    assert (found.state, ran) == ("failed", [])
    assert "each of 2 attempts" in (found.error or "")
