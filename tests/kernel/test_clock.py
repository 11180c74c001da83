"""The clock goes on when the system clock is set back, and catches up with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from corral import clock
from corral.jobs.job import ScheduleRow

HOUR = 3600.0


class SystemClock:
    """The clocks of the machine, which a test can set and let run."""

    def __init__(self) -> None:
        self.passed = self.changed = 0.0

    def time(self) -> float:
        return time.time() + self.passed + self.changed

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.fixture
def system_clock(monkeypatch: pytest.MonkeyPatch) -> SystemClock:
    found = SystemClock()
    monkeypatch.setattr(clock, "time", found)
    clock.reset()
    return found


def ahead(system_clock: SystemClock) -> float:
    """By how many seconds the clock is ahead of the system clock."""
    return clock.time_s() - system_clock.time()


def test_it_follows_the_system_clock(system_clock: SystemClock) -> None:
    for change in (0.0, HOUR, 400 * 24 * HOUR, -0.5):
        before = clock.time_s()
        system_clock.changed += change
        assert ahead(system_clock) == pytest.approx(0, abs=0.1)
        assert clock.time_s() - before == pytest.approx(change, abs=0.1)


def test_it_goes_on_when_the_system_clock_is_set_back(system_clock: SystemClock) -> None:
    before, until = clock.time_s(), clock.now(60)
    system_clock.changed -= HOUR
    assert clock.time_s() - before == pytest.approx(0, abs=0.1)
    assert clock.system_time_s() - before == pytest.approx(-HOUR, abs=0.1)
    system_clock.passed += 64
    assert clock.now() > until
    assert clock.time_s() - before == pytest.approx(64 * 0.95, abs=0.1)


def test_it_catches_up(system_clock: SystemClock) -> None:
    clock.time_s()
    system_clock.changed -= HOUR
    clock.time_s()
    for hours, left in ((10, HOUR / 2), (9, HOUR / 20), (2, 0.0), (10, 0.0)):
        last = clock.time_s()
        system_clock.passed += hours * HOUR
        assert ahead(system_clock) == pytest.approx(left, abs=1.0)
        assert clock.time_s() > last


def test_a_mistake_that_is_corrected_leaves_no_trace(system_clock: SystemClock) -> None:
    before = clock.time_s()
    system_clock.changed -= HOUR
    clock.time_s()
    system_clock.passed += 10
    system_clock.changed += HOUR
    assert clock.time_s() - before == pytest.approx(10, abs=0.1)
    assert ahead(system_clock) == pytest.approx(0, abs=0.1)


def test_a_clock_that_was_days_ahead_is_corrected_at_once(system_clock: SystemClock) -> None:
    clock.time_s()
    system_clock.changed -= 2 * 24 * HOUR
    assert ahead(system_clock) == pytest.approx(0, abs=0.1)


def test_it_continues_from_the_time_of_the_database(system_clock: SystemClock) -> None:
    for seconds, expected in ((-HOUR, 0.0), (3 * 24 * HOUR, 0.0), (HOUR, HOUR)):
        clock.continue_from(clock.now(seconds))
        assert ahead(system_clock) == pytest.approx(expected, abs=0.1)
    clock.travel(10 * HOUR)
    clock.continue_from(clock.now(-HOUR))
    assert ahead(system_clock) == pytest.approx(11 * HOUR, abs=0.1)


async def test_a_server_that_starts_after_the_step_continues_too(
    system_clock: SystemClock, make_kit: Callable[..., Any]
) -> None:
    kit = await make_kit(plugins=[])
    last = clock.now()
    await kit.kernel.database.work(
        lambda: ScheduleRow.insert(name="test.tick", next_at=clock.now(5), last_at=last).execute()
    )
    system_clock.changed -= HOUR
    clock.reset()
    assert clock.now() < last
    await make_kit(plugins=[])
    assert clock.now() >= last
