"""The state machine of a breaker in one process: what counts, transitions, probes, windows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from playhouse.schema_diff import diff_models
from tests.plugins.circuit_breakers.conftest import NAME, Panel, is_rejected, problem, until

from corral import clock
from corral.errors import Unavailable
from corral.testing.conformance import check_plugin
from corral_plugins.circuit_breakers.models import TABLES, PermitRow
from corral_plugins.circuit_breakers.plugin import CircuitBreakersPlugin
from corral_plugins.circuit_breakers.service.local_state import MAX_PENDING, LocalBreaker


async def test_models_and_migration_agree(panel: Panel) -> None:
    engine = panel.kit.kernel.database.engine
    assert await panel.kit.work(lambda: str(diff_models(engine, TABLES))) == ""


@pytest.mark.one_engine
async def test_a_failing_target_opens_the_breaker_and_a_probe_closes_it(panel: Panel) -> None:
    await panel.fails(9)
    assert (await panel.get())["state"] == "closed"
    await panel.fails(1)
    assert is_rejected(await panel.call())  # before any row says so
    found = await panel.get()
    assert (found["state"], found["reason"], found["counts"]["failures"]) == ("open", "10 of 10 calls failed.", 10)
    assert found["last_error"]["type"] == "ConnectionError"
    rejected = await panel.call()
    assert is_rejected(rejected)
    assert rejected.retry_at == found["retry_at"]
    assert int(rejected.headers["Retry-After"]) in (29, 30)
    assert panel.calls == 10
    clock.travel(31)
    assert await panel.call() == "fine"
    found = await panel.get()
    assert (found["state"], found["counts"]["calls"], found["opened_at"]) == ("closed", 0, None)
    steps = [(each["from"], each["to"]) for each in found["transitions"]]
    assert steps == [("half_open", "closed"), ("open", "half_open"), ("closed", "open")]
    events = [event.type for event in await panel.kit.events() if event.type.startswith("circuit.")]
    assert events == ["circuit.opened", "circuit.half_opened", "circuit.closed"]


@pytest.mark.one_engine
async def test_a_failing_probe_opens_the_breaker_again(panel: Panel) -> None:
    await panel.fails(10)
    await panel.sync()
    opened = (await panel.get())["opened_at"]
    clock.travel(31)
    await panel.fails(1)
    found = await panel.get()
    assert (found["state"], found["opened_at"], found["reason"]) == ("open", opened, "Probe: 1 of 1 calls failed.")
    assert is_rejected(await panel.call())


async def test_at_most_three_probes_run_at_a_time(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    take, asked = panel.breakers._transitions.take_permit, []

    def take_permit(name: str) -> Any:
        asked.append(name)
        return take(name)

    monkeypatch.setattr(panel.breakers._transitions, "take_permit", take_permit)
    await panel.fails(10)
    await panel.sync()
    clock.travel(31)
    running = most = 0
    gate = asyncio.Event()

    async def slow() -> str:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await gate.wait()
        running -= 1
        return "fine"

    calls = [asyncio.ensure_future(panel.call(slow)) for _ in range(50)]
    await until(lambda: sum(each.done() for each in calls) == 47 and running == 3)
    gate.set()
    outcomes = await asyncio.gather(*calls)
    assert (most, outcomes.count("fine"), sum(map(is_rejected, outcomes))) == (3, 3, 47)
    assert len(asked) == 3  # the others were rejected without I/O
    assert (await panel.get())["state"] == "closed"


@pytest.mark.one_engine
async def test_calls_that_began_before_a_transition_do_not_count(panel: Panel) -> None:
    gate = asyncio.Event()

    async def late() -> None:
        await gate.wait()
        raise ConnectionError

    before = [asyncio.ensure_future(panel.call(late)) for _ in range(20)]
    await asyncio.sleep(0)
    await panel.fails(10)
    await panel.sync()
    clock.travel(31)
    assert await panel.call() == "fine"
    gate.set()
    await asyncio.gather(*before)
    found = await panel.get()
    assert (found["state"], found["counts"]["calls"]) == ("closed", 0)


@pytest.mark.one_engine
async def test_cancelled_calls_give_their_permit_back_and_count_for_nothing(panel: Panel) -> None:
    await panel.fails(10)
    await panel.sync()
    clock.travel(31)
    probe = asyncio.ensure_future(panel.call(asyncio.Event().wait))
    await until(lambda: panel.calls == 11)
    probe.cancel()
    await asyncio.wait({probe})
    await until(lambda: not panel.breakers._breakers[NAME].probing)
    found = await panel.get()
    assert (found["state"], found["counts"]["calls"]) == ("half_open", 0)
    assert await panel.call() == "fine"
    assert (await panel.get())["state"] == "closed"


async def test_a_lost_permit_counts_as_a_failure(panel: Panel) -> None:
    await panel.fails(10)
    await panel.sync()
    clock.travel(31)
    transitions = panel.breakers._transitions
    admission = await panel.kit.work(lambda: transitions.take_permit(NAME))  # by a process that then dies
    permit = admission.permit
    assert permit is not None
    clock.travel(29)
    await panel.kit.run_schedule("circuit_breakers.sweep")
    assert (await panel.get())["state"] == "half_open"
    clock.travel(2)
    await panel.kit.run_schedule("circuit_breakers.sweep")
    assert (await panel.get())["state"] == "open"
    await panel.kit.work(lambda: transitions.return_permit(NAME, permit, "success", None))
    assert (await panel.get())["state"] == "open"


@pytest.mark.one_engine
async def test_a_running_probe_keeps_its_permit(panel: Panel) -> None:
    await panel.fails(10)
    await panel.sync()
    clock.travel(31)
    gate = asyncio.Event()
    probe = asyncio.ensure_future(panel.call(gate.wait))
    await until(lambda: panel.calls == 11)
    for _ in range(3):
        clock.travel(15)
        await panel.sync()
        assert await panel.kit.work(PermitRow.select().where(PermitRow.expires_at > clock.now(10)).count, read=True)
    await panel.kit.run_schedule("circuit_breakers.sweep")
    assert (await panel.get())["state"] == "half_open"
    clock.travel(16)
    await panel.sync()
    await panel.kit.run_schedule("circuit_breakers.sweep")  # 61 s after it became half open
    assert (await panel.get())["state"] == "open"
    gate.set()
    await probe
    assert (await panel.get())["state"] == "open"


@pytest.mark.one_engine
async def test_slow_calls_open_the_breaker(panel: Panel) -> None:
    await panel.configure(status=200, slow_call_duration_seconds=5, slow_call_rate_threshold=60)

    async def slow() -> None:
        clock.travel(6)

    for _ in range(4):
        await panel.call()
    for _ in range(6):
        await panel.call(slow)
    found = await panel.get()
    assert (found["state"], found["counts"]["slow_rate"]) == ("open", 60.0)
    assert found["reason"] == "6 of 10 calls took longer than 5 seconds."


@pytest.mark.one_engine
async def test_a_time_window_forgets(panel: Panel) -> None:
    await panel.configure(status=200, window_type="time", window_size=60, minimum_calls=4)
    await panel.fails(3)
    await panel.sync()
    clock.travel(62)
    await panel.fails(3)
    assert (await panel.get())["counts"]["calls"] == 3
    await panel.fails(1)
    assert (await panel.get())["state"] == "open"


@pytest.mark.one_engine
async def test_the_window_holds_the_last_calls_only(panel: Panel) -> None:
    for _ in range(20):
        await panel.call()
    await panel.fails(9)
    assert (await panel.get())["counts"] == {
        "calls": 20,
        "failures": 9,
        "slow": 0,
        "rejected": 0,
        "failure_rate": 45.0,
        "slow_rate": 0.0,
        "neutral": 0,
        "permits_out": 0,
    }
    await panel.fails(1)
    assert (await panel.get())["state"] == "open"


@pytest.mark.one_engine
async def test_without_the_database_the_process_decides_alone(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    database: Any = panel.kit.kernel.database
    work = database.work

    async def gone(*_: Any, **__: Any) -> None:
        raise Unavailable

    monkeypatch.setattr(database, "work", gone)
    await panel.fails(12)
    assert panel.calls == 10
    with pytest.raises(Unavailable):
        await panel.sync()
    clock.travel(31)
    await panel.fails(2)
    assert panel.calls == 11
    clock.travel(31)
    assert await panel.call() == "fine"
    assert panel.breakers.state(NAME) == "closed"
    monkeypatch.setattr(database, "work", work)
    assert (await panel.get())["state"] == "closed"


@pytest.mark.one_engine
@pytest.mark.one_engine
async def test_a_report_that_could_not_be_stored_displaces_no_newer_call(panel: Panel) -> None:
    breaker = LocalBreaker(NAME, panel.breakers._defaults.config_of(NAME, None))
    for _ in range(MAX_PENDING):
        breaker.count("failure", 1, None)
    lost = breaker.take_report()
    assert lost is not None
    for _ in range(20):
        breaker.count("success", 1, None)
    breaker.restore_report(lost)
    report = breaker.take_report()
    assert report is not None
    assert len(report.outcomes) == MAX_PENDING
    assert [outcome for outcome, _ in report.outcomes[-21:]] == ["failure"] + ["success"] * 20


@pytest.mark.one_engine
async def test_probes_without_the_database_do_not_count_after_its_return(
    panel: Panel, monkeypatch: pytest.MonkeyPatch
) -> None:
    await panel.fails(10)
    await panel.sync()

    async def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("the database is away")

    clock.travel(31)
    with monkeypatch.context() as patch:
        patch.setattr(panel.breakers._database, "work", away)
        patch.setattr(panel.breakers._database, "read", away)  # or the loop that follows the rows could still read
        await panel.fails(1)  # a probe of this process alone
        assert is_rejected(await panel.call())
    await panel.sync()
    clock.travel(31)

    async def goes_away() -> str:
        monkeypatch.setattr(panel.breakers._database, "work", away)
        monkeypatch.setattr(panel.breakers._database, "read", away)
        return "fine"

    assert await panel.call(goes_away) == "fine"
    assert panel.breakers.state(NAME) == "closed"


@pytest.mark.one_engine
async def test_an_alert_after_five_minutes(panel: Panel) -> None:
    await panel.fails(10)
    await panel.sync()
    for seconds in (31, 120, 120, 31):
        clock.travel(seconds)
        await panel.fails(1)  # a probe that opens it again
        await panel.kit.run_schedule("circuit_breakers.sweep")
    clock.travel(60)
    await panel.kit.run_schedule("circuit_breakers.sweep")
    alerts = [event.payload() for event in await panel.kit.events() if event.type == "system.alert"]
    assert [(alert["kind"], alert["object"]["id"]) for alert in alerts] == [("circuit_open", NAME)]


@pytest.mark.one_engine
async def test_health_and_metrics(panel: Panel) -> None:
    await panel.fails(10)
    await panel.call(problem(400), "llm:openai")
    panel.breakers.declare("llm")
    await panel.call(problem(404), "llm:other-one")
    await panel.call()
    await panel.sync()
    health = (await panel.admin.get("/settings/health")).json()
    check = health["checks"]["circuit_breakers"]
    assert (check["status"], NAME in check["detail"]) == ("degraded", True)
    lines = (await panel.admin.get("/metrics", root=True)).body.decode().splitlines()
    wanted = [
        f'corral_breaker_state{{breaker="{NAME}"}} 2.0',
        'corral_breaker_state{breaker="llm"} 0.0',
        f'corral_breaker_calls_total{{breaker="{NAME}",outcome="failure"}} 10.0',
        'corral_breaker_calls_total{breaker="llm",outcome="neutral"} 2.0',
        f'corral_breaker_rejected_total{{breaker="{NAME}"}} 1.0',
        f'corral_breaker_transitions_total{{breaker="{NAME}",to="open"}} 1.0',
    ]
    assert [line for line in wanted if line not in lines] == [], [line for line in lines if "breaker" in line]


@pytest.mark.postgres
def test_the_plugin_keeps_the_contract(postgres_server: Any) -> None:
    report = check_plugin(CircuitBreakersPlugin, postgres_url=postgres_server.create_database())
    assert report.ok, report
