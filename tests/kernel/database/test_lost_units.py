"""Rule 7 of the unit of work: units that hang are lost, and routes that lose them are held."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
from tests.kernel.database.conftest import keys, note
from tests.limits import within

from corral.database.engine import Database
from corral.database.unit import UnitContext, current
from corral.errors import Unavailable


async def test_unit_of_work_7_a_unit_of_more_than_50_ms_is_logged(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await database.work(lambda: time.sleep(0.06), entry=UnitContext("GET /slow"))
    (told,) = [record for record in caplog.records if record.message == "slow unit" and record.unit == "GET /slow"]  # type: ignore[attr-defined]  # an extra
    assert told.duration_ms >= 60  # type: ignore[attr-defined]  # an extra


async def test_unit_of_work_7_a_unit_that_hangs_is_lost_and_the_others_run(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    gate, began = threading.Event(), threading.Event()

    def hang() -> None:
        note("slow")
        began.set()
        gate.wait(60)

    slow = asyncio.ensure_future(database.work(hang, entry=UnitContext("GET /slow")))
    await asyncio.to_thread(began.wait, 60)
    async with within(3.5):
        others = await asyncio.gather(*[database.work(partial(note, f"n{i}")) for i in range(5)])
        with pytest.raises(Unavailable):
            await slow
    gate.set()
    assert len(others) == 5
    lost = next(record for record in caplog.records if record.message == "unit lost")
    assert "test_lost_units.py" in lost.stack  # type: ignore[attr-defined]  # an extra
    await asyncio.sleep(0.1)
    assert keys(database) == {f"n{i}" for i in range(5)}


async def test_unit_of_work_7_a_unit_lost_between_its_rows_leaves_no_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it take the process along: only its own thread closes its statements. No garbage collector helps."""
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.3)
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT i FROM n"

    def read_on() -> None:
        note("lost")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for _ in current().database.engine.execute_sql(rows):
                pass

    gc.disable()
    try:
        for number in range(4):
            with pytest.raises(Unavailable):
                await database.work(read_on, entry=UnitContext(f"GET /rows/{number}"))
            await database.work(partial(note, f"n{number}"))
    finally:
        gc.enable()
    assert keys(database) == {f"n{number}" for number in range(4)}


async def test_unit_of_work_7_a_process_that_stood_still_loses_no_unit(database: Database) -> None:
    """`PyDLL` keeps the interpreter's lock: for three seconds nothing runs, as when a machine is paused."""
    await database.work(lambda: (note("paused"), ctypes.PyDLL(None).usleep(3_000_000)))
    assert keys(database) == {"paused"}


SLOW = UnitContext("GET /slow", request_id="r-1")


def counted(database: Database, label: str) -> float | None:
    """When a route lost its last unit, as far as that was counted."""
    return database.pools[0].quarantine.last_loss.get(label)


async def lose(database: Database) -> None:
    """One unit, and wait until it is counted."""
    before = counted(database, SLOW.label)
    with pytest.raises(Unavailable, match="took too long"):
        await database.work(lambda: time.sleep(2), entry=SLOW)
    async with asyncio.timeout(60):
        while counted(database, SLOW.label) == before:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)


async def test_unit_of_work_7_two_losses_hold_the_route_for_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.6)
    monkeypatch.setattr("corral.database.pool.QUARANTINE_SECONDS", 3.0)
    for _ in range(2):
        await lose(database)
    for _ in range(3):
        with pytest.raises(Unavailable) as refused:
            await database.work(lambda: 1, entry=SLOW)
        assert (refused.value.code, int(refused.value.headers["Retry-After"]) in (1, 2, 3)) == ("plugin_failed", True)
    assert await database.work(lambda: 1, entry=UnitContext("GET /other", request_id="r-2")) == 1
    await asyncio.sleep(3.2)
    await lose(database)  # it may try again, and its losses count anew
    assert await database.work(lambda: 1, entry=SLOW) == 1
    await lose(database)
    with pytest.raises(Unavailable, match="ran too long twice"):
        await database.work(lambda: 1, entry=SLOW)


async def test_unit_of_work_7_only_routes_are_held(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What everybody needs, such as the look at a credential or the sequencer, is nobody's to take away."""
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.3)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await database.work(lambda: time.sleep(1), entry=UnitContext("authentication"))
        await asyncio.sleep(0.3)
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 2.0)
    assert await database.work(lambda: 1, entry=UnitContext("authentication")) == 1


async def test_unit_of_work_7_losses_at_the_same_time_are_one(
    open_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database()
    await asyncio.gather(*[database.work(lambda: 1, read=True) for _ in range(20)])  # every connection is open
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 0.3)
    lost = await asyncio.gather(
        *[database.work(lambda: time.sleep(1), entry=SLOW, read=True) for _ in range(3)], return_exceptions=True
    )
    assert [type(each) for each in lost] == [Unavailable] * 3
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 2.0)
    await asyncio.sleep(0.5)
    assert await database.work(lambda: 1, entry=SLOW, read=True) == 1


async def test_unit_of_work_7_what_waits_when_its_route_comes_to_be_held_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.database.pool.LOST_AFTER", 1.0)  # a busy machine takes its time to connect
    work = [database.work(lambda: time.sleep(2), entry=SLOW) for _ in range(60)]
    other = database.work(lambda: 1, entry=UnitContext("GET /other", request_id="r-2"))
    *answers, one = await asyncio.gather(*work, other, return_exceptions=True)
    codes = [each.code for each in answers if isinstance(each, Unavailable)]
    assert (len(codes), one) == (60, 1)
    connections = database.connection_usage()[1] if database.kind == "postgresql" else 1
    assert 2 <= codes.count("dependency_unavailable") <= 7 * connections
    assert codes.count("plugin_failed") == 60 - codes.count("dependency_unavailable")
