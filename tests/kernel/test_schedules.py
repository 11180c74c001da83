"""Schedules run once per due time, at an interval or at a time of day in a time zone, and on request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from tests.kernel.isolation.misbehaving import plugin, until

from corral import clock
from corral.database.unit import after_commit
from corral.jobs.job import Schedule, ScheduleRow, TimeOfDay
from corral.jobs.runner import SCHEDULE_LEASE_SECONDS, JobRunner
from corral.testing.kit import Kit

MakeKit = Callable[..., Awaitable[Kit]]
DAY = 86_400.0


def instant(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def following(times: TimeOfDay, after: str, count: int = 1) -> list[str]:
    """The next due times after an instant in UTC, each without seconds."""
    found, seconds = [], instant(after)
    for _ in range(count):
        seconds = times.next_after(seconds)
        found.append(datetime.fromtimestamp(seconds, UTC).strftime("%m-%d %H:%M"))
    return found


def test_a_time_of_day_follows_its_zone_and_days() -> None:
    berlin = TimeOfDay("07:30", "Europe/Berlin")
    assert following(berlin, "2026-07-01 05:29:59", 2) == ["07-01 05:30", "07-02 05:30"]
    assert following(berlin, "2026-07-01 05:30:00") == ["07-02 05:30"]
    assert following(berlin, "2026-10-24 12:00:00", 2) == ["10-25 06:30", "10-26 06:30"]
    weekdays = TimeOfDay("23:00", "Pacific/Auckland", days=("mon", "fri"))  # 12 hours ahead in July
    assert following(weekdays, "2026-07-01 00:00:00", 3) == ["07-03 11:00", "07-06 11:00", "07-10 11:00"]
    assert following(TimeOfDay("00:00", "UTC"), "2026-12-31 00:00:00") == ["01-01 00:00"]


def test_a_time_that_the_zone_skips_is_the_next_one_that_exists() -> None:
    berlin = TimeOfDay("02:30", "Europe/Berlin")  # on 29 March 2026, 02:00 is followed by 03:00
    assert following(berlin, "2026-03-28 00:00:00", 3) == ["03-28 01:30", "03-29 01:00", "03-30 00:30"]
    apia = TimeOfDay("07:30", "Pacific/Apia")  # which had no 30 December 2011
    assert following(apia, "2011-12-29 00:00:00", 3) == ["12-29 17:30", "12-30 10:00", "12-30 17:30"]


def test_a_time_that_comes_twice_counts_once() -> None:
    berlin = TimeOfDay("02:30", "Europe/Berlin")  # on 25 October 2026, 03:00 is followed by 02:00
    assert following(berlin, "2026-10-24 00:00:00", 3) == ["10-24 00:30", "10-25 00:30", "10-26 01:30"]
    midnight = TimeOfDay("23:30", "America/Sao_Paulo")  # on 17 February 2018, midnight was followed by 23:00
    assert following(midnight, "2018-02-17 12:00:00", 2) == ["02-18 01:30", "02-19 02:30"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("24:00", "UTC"), "'24:00' is not a time of day; write it as HH:MM, such as 07:30"),
        (("7:30", "UTC"), "'7:30' is not a time of day"),
        ((730, "UTC"), "730 is not a time of day"),
        (("07:30", "Europe/Berlyn"), "'Europe/Berlyn' is not an IANA time zone; write it like Europe/Berlin, or"),
        (("07:30", "../zone"), "'../zone' is not an IANA time zone"),
        (("07:30", "Europe"), "'Europe' is not an IANA time zone"),
        (("07:30", ""), "'' is not an IANA time zone"),
        (("07:30", "UTC", ("monday",)), "the days ('monday',) must be one or more of mon, tue, wed"),
        (("07:30", "UTC", ()), "the days () must be one or more of mon, tue, wed"),
    ],
)
@pytest.mark.one_engine
async def test_a_bad_time_or_zone_is_refused_at_boot(arguments: Any, told: str, make_kit: MakeKit) -> None:
    def schedules(self: Any) -> list[Schedule]:
        return [Schedule("odd.tick", TimeOfDay(*arguments), print)]

    kit = await make_kit(plugins=[plugin("odd", corral_schedules=schedules)])
    odd = kit.loaded("odd")
    assert (odd.state, told in (odd.reason or "")) == ("failed", True), odd.reason


def daily(runs: list[float], *times: Any) -> Any:
    tick = Schedule("daily.tick", TimeOfDay(*times), lambda: runs.append(clock.time_s()))
    return plugin("daily", corral_schedules=lambda self: [tick])


async def check(*runners: JobRunner) -> None:
    """Let several processes look for due schedules at the same moment, and wait for what they start."""
    for runner in runners:
        runner._next_checks.clear()
    await asyncio.gather(*[runner._tick() for runner in runners])
    await asyncio.gather(*[task for runner in runners for task in runner._running])


async def processes(kit: Kit, name: str, count: int = 3) -> list[JobRunner]:
    """Job runners of further processes on the database of a kit."""
    found = []
    for _ in range(count):
        runner = JobRunner(kit.kernel.database, redact=str)
        runner.add([], [kit.kernel.runner.schedules[name]], lambda: True)
        found.append(runner)
    return found


async def test_it_runs_once_at_its_time_in_all_processes(make_kit: MakeKit) -> None:
    runs: list[float] = []
    kit = await make_kit(plugins=[daily(runs, "07:30", "Europe/Berlin")])
    many = await processes(kit, "daily.tick")
    clock.travel(instant("2031-03-29 12:00:00") - clock.time_s())
    await check(*many)
    assert runs == []  # not at the first start, but at its time
    due = kit.kernel.runner.schedules["daily.tick"].next_after(clock.time_s())
    assert due == instant("2031-03-30 05:30:00")  # the first day of summer time
    clock.travel(due - clock.time_s() - 5)
    await check(*many)
    assert runs == []
    for _ in range(3):
        clock.travel(6)
        await check(*many)
        await check(*many)
    (ran,) = runs
    assert 0 <= ran - due < 6
    clock.travel(2.5 * DAY)  # no process ran schedules meanwhile: one run makes up for both days
    await check(*many)
    await check(*many)
    assert len(runs) == 2
    row = await kit.work(lambda: ScheduleRow.get_by_id("daily.tick"), read=True)
    assert (row.next_at[:16], row.lease) == ("2031-04-02T05:30", None)


async def test_two_processes_that_claim_in_the_same_millisecond_run_it_once(
    make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[float] = []
    tick = Schedule("same.tick", 60, lambda: runs.append(1))
    kit = await make_kit(plugins=[plugin("same", corral_schedules=lambda self: [tick])])
    many = await processes(kit, "same.tick")
    now = clock.time_s()
    monkeypatch.setattr(clock, "time_s", lambda: now)
    await check(*many)
    assert len(runs) == 1


async def test_schedules_that_are_due_together_are_claimed_in_one_unit(
    make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def schedule(number: int) -> Schedule:
        async def report() -> None:
            runs.append(f"many.tick{number}")

        def write() -> None:  # may run again if its unit does, which is undone then
            after_commit(lambda: runs.append(f"many.tick{number}"))

        return Schedule(f"many.tick{number}", 5 if number < 9 else 10, write if number % 2 else report)

    schedules = [schedule(number) for number in range(12)]
    kit = await make_kit(plugins=[plugin("many", corral_schedules=lambda self: schedules)])
    many = await processes(kit, "many.tick0")
    for runner in many:
        runner.add([], schedules, lambda: True)
    await check(*many)
    assert sorted(runs) == sorted(each.name for each in schedules)  # each at once, in one of the processes
    now, claims = (clock.time_s() // 60 + 2) * 60, list[int]()

    def count(claim: Callable[[Sequence[str]], Any], names: Sequence[str]) -> Any:
        claims.append(len(names))
        return claim(names)

    for runner in many:
        monkeypatch.setattr(runner, "claim_schedules", partial(count, runner.claim_schedules))
    monkeypatch.setattr(clock, "time_s", lambda: now)
    await check(*many)
    for slot in range(4):
        now += 5
        runs.clear()
        claims.clear()
        await check(*many)
        await check(*many)
        due = [each.name for each in schedules if slot % 2 or each.every == 5]
        assert sorted(runs) == sorted(due), slot
        assert len(claims) <= 6 * 3, claims  # one a check, which a conflict of two processes may repeat


async def test_a_schedule_whose_process_was_killed_is_repeated(make_kit: MakeKit) -> None:
    runs: list[float] = []
    kit = await make_kit(plugins=[daily(runs, "07:30", "UTC")])
    (killed, other) = await processes(kit, "daily.tick", 2)
    await check(killed)
    clock.travel(DAY)
    ((_, is_claimed),) = await kit.work(lambda: killed.claim_schedules(["daily.tick"]))
    assert is_claimed  # and the process is gone
    await check(other)
    assert runs == []
    clock.travel(SCHEDULE_LEASE_SECONDS + 1)
    await check(other)
    assert len(runs) == 1


async def test_a_long_run_keeps_its_lease(make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.jobs.runner.SCHEDULE_LEASE_SECONDS", 0.3)
    runs: list[float] = []
    go_on = asyncio.Event()

    async def slow() -> None:
        runs.append(1)
        await go_on.wait()

    kit = await make_kit(plugins=[plugin("slow", corral_schedules=lambda self: [Schedule("slow.tick", 3600, slow)])])
    first, second = await processes(kit, "slow.tick", 2)
    await first._tick()
    await first._tick()
    for _ in range(10):
        await asyncio.sleep(0.1)
        second._next_checks.clear()
        await second._tick()
    assert len(runs) == 1
    go_on.set()
    await asyncio.gather(*first._running)
    row = await kit.work(lambda: ScheduleRow.get_by_id("slow.tick"), read=True)
    assert (row.lease, row.next_at > clock.now(3500)) == (None, True)


async def test_a_run_that_lost_its_lease_undoes_what_it_did(
    make_kit: MakeKit, caplog: pytest.LogCaptureFixture
) -> None:
    kit = await make_kit(plugins=[daily([], "07:30", "UTC")])
    runner = kit.kernel.runner
    ((row, _),) = await kit.work(lambda: runner.claim_schedules(["daily.tick"], due=True))
    clock.travel(SCHEDULE_LEASE_SECONDS + 1)
    ((_, is_claimed),) = await kit.work(lambda: runner.claim_schedules(["daily.tick"]))
    assert is_claimed
    with caplog.at_level(logging.WARNING, "corral.jobs"):
        assert type(await runner.start_schedule(row)).__name__ == "LeaseLost"
    (line,) = [record for record in caplog.records if record.name == "corral.jobs"]
    assert (line.message, line.exc_info) == ("schedule failed", None)


@pytest.mark.parametrize("changed", ["06:00", "09:00"])
async def test_another_time_of_day_takes_effect_at_once(changed: str, make_kit: MakeKit) -> None:
    runs: list[float] = []
    kit = await make_kit(plugins=[daily(runs, "07:30", "UTC")])
    clock.travel(instant("2031-05-05 10:00:00") - clock.time_s())
    (runner,) = await processes(kit, "daily.tick", 1)
    await check(runner)
    updated = JobRunner(kit.kernel.database, redact=str)
    updated.add([], [Schedule("daily.tick", TimeOfDay(changed, "UTC"), print)], lambda: True)
    await check(updated)
    row = await kit.work(lambda: ScheduleRow.get_by_id("daily.tick"), read=True)
    assert (runs, row.next_at) == ([], f"2031-05-06T{changed}:00.000Z")


# On request


def reporting(runs: list[str], go_on: asyncio.Event | None = None) -> Any:
    async def report() -> None:
        runs.append("report")
        if go_on is not None:
            await go_on.wait()

    def broken() -> None:
        raise ValueError("it is broken")

    schedules = [
        Schedule("news.report", TimeOfDay("07:30", "Europe/Berlin", ("mon", "fri")), report),
        Schedule("news.broken", 3600, broken),
    ]
    return plugin("news", corral_schedules=lambda self: schedules)


async def test_an_admin_runs_a_schedule_now(make_kit: MakeKit) -> None:
    runs: list[str] = []
    kit = await make_kit(plugins=[reporting(runs), "audit"])
    admin = await kit.as_user("admin")
    report, broken = (await admin.get("/plugins/news")).json()["schedules"]
    assert report == {
        "name": "news.report",
        "timing": "at 07:30 Europe/Berlin on mon, fri",
        "running": False,
        "last_at": None,
        "next_at": None,
        "error": None,
    }
    assert (broken["name"], broken["timing"]) == ("news.broken", "every 3600 s")
    answer = await admin.post("/plugins/news/schedules/news.report/run")
    found = answer.json()
    assert (answer.status, runs, found["running"], found["error"]) == (200, ["report"], False, None), answer
    due = kit.kernel.runner.schedules["news.report"].next_after(clock.time_s())
    assert (found["next_at"], found["last_at"] <= clock.now()) == (clock.format_instant(due), True)
    assert (await admin.get("/plugins/news")).json()["schedules"][0] == found
    failed = (await admin.post("/plugins/news/schedules/news.broken/run")).json()
    assert failed["error"] == "ValueError: it is broken"
    rows = (await admin.get("/admin/audit?action=plugins.schedule.run")).json()["items"]
    assert [(row["object"]["id"], row["actor"]["id"]) for row in rows] == [
        ("news.broken", admin.user["id"]),
        ("news.report", admin.user["id"]),
    ]


async def test_who_and_what_is_refused(make_kit: MakeKit) -> None:
    kit = await make_kit(plugins=[reporting([]), "security"])
    admin, member = await kit.as_user("admin"), await kit.as_user("member")
    assert (await member.post("/plugins/news/schedules/news.report/run")).code == "forbidden"
    unknown = await admin.post("/plugins/news/schedules/news.tick/run")
    assert (unknown.status, unknown.json()["detail"]) == (
        404,
        "The plugin news has no schedule news.tick; its schedules are news.report, news.broken.",
    )
    assert (await admin.post("/plugins/nothing/schedules/news.report/run")).status == 404
    foreign = await admin.post("/plugins/plugin_admin/schedules/news.report/run")
    assert (foreign.status, foreign.json()["detail"].endswith("; it has no schedules.")) == (404, True)
    kit.kernel.registry.change_state("news", "disabled", "admin")
    refused = await admin.post("/plugins/news/schedules/news.report/run")
    assert (refused.code, refused.json()["current_status"]) == ("invalid_state", "disabled")


async def test_two_requests_at_once_run_it_once(make_kit: MakeKit) -> None:
    runs: list[str] = []
    go_on = asyncio.Event()
    kit = await make_kit(plugins=[reporting(runs, go_on)])
    admin = await kit.as_user("admin")
    path = "/plugins/news/schedules/news.report/run"
    both = [asyncio.ensure_future(admin.post(path)) for _ in range(2)]
    await until(lambda: any(request.done() for request in both))
    (refused,) = [request.result() for request in both if request.done()]
    assert (refused.code, refused.json()["current_status"]) == ("invalid_state", "running")
    (shown, _) = (await admin.get("/plugins/news")).json()["schedules"]
    due = kit.kernel.runner.schedules["news.report"].next_after(clock.time_s())
    assert (shown["running"], shown["next_at"]) == (True, clock.format_instant(due))
    with pytest.raises(RuntimeError, match="already running"):
        await kit.run_schedule("news.report")
    go_on.set()
    answers = await asyncio.gather(*both)
    assert (sorted(answer.status for answer in answers), runs) == ([200, 409], ["report"])


async def test_a_long_run_continues_after_the_response(make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral_core.plugin_admin.service.schedules.WAIT_SECONDS", 0.1)
    runs: list[str] = []
    go_on = asyncio.Event()
    kit = await make_kit(plugins=[reporting(runs, go_on)])
    admin = await kit.as_user("admin")
    answer = await admin.post("/plugins/news/schedules/news.report/run")
    assert (answer.status, answer.json()["running"]) == (202, True)
    go_on.set()
    await asyncio.gather(*kit.kernel.runner._running)
    (shown, _) = (await admin.get("/plugins/news")).json()["schedules"]
    assert (shown["running"], shown["error"], runs) == (False, None, ["report"])
