"""The threads of a process: half of them for one plugin at most, none lost for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from corral.current_call import room
from corral.errors import ContributionFailed
from corral.plugins.executor import PluginThreads


@pytest.fixture
def threads() -> Iterator[PluginThreads]:
    made = PluginThreads(4)
    yield made
    made.shutdown()


def of(name: str | None, threads: PluginThreads, call: Callable[[], Any]) -> Future[Any]:
    token = room.set(name)
    try:
        return threads.submit(call)
    finally:
        room.reset(token)


def test_values_and_errors_come_back(threads: PluginThreads) -> None:
    assert [threads.submit(pow, 2, n).result(5) for n in range(20)] == [2**n for n in range(20)]
    with pytest.raises(SystemExit):
        threads.submit(lambda: (_ for _ in ()).throw(SystemExit(1))).result(5)
    assert threads.submit(lambda: threading.current_thread().daemon).result(5)


def test_one_plugin_has_half_of_them(threads: PluginThreads) -> None:
    stop, running = threading.Event(), []

    def block() -> None:
        running.append(1)
        stop.wait(20)

    blocked = [of("slow", threads, block) for _ in range(10)]
    assert of(None, threads, lambda: "core").result(5) == "core"
    assert of("other", threads, lambda: "other").result(5) == "other"
    end = time.monotonic() + 5
    while len(running) < threads.share:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(running) == threads.share == 2
    stop.set()
    for each in blocked:
        each.result(5)
    assert len(running) == 10  # the rest waited and was done


def test_an_abandoned_thread_is_replaced(threads: PluginThreads) -> None:
    inside: list[int] = []
    stop = threading.Event()

    def block() -> None:
        inside.append(threading.get_ident())
        stop.wait(20)

    blocked = [of("slow", threads, block) for _ in range(4)]
    end = time.monotonic() + 5
    while len(inside) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    for thread in tuple(inside):
        threads.abandon(thread, "it")
    for each in blocked[:2]:
        with pytest.raises(ContributionFailed, match="it did not come back in time"):
            each.result(1)
    assert [threads.submit(lambda n=n: n).result(5) for n in range(4)] == [0, 1, 2, 3]  # type: ignore[misc]
    stop.set()
    for each in blocked[2:]:
        each.result(5)


def test_a_call_that_counted_on_a_busy_thread_gets_another(
    threads: PluginThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has its task already and is still counted as idle when the next call comes."""
    took, go_on, stop = threading.Event(), threading.Event(), threading.Event()
    take = threads._next

    def slowly() -> Any:
        task = take()
        took.set()
        go_on.wait(5)
        return task

    monkeypatch.setattr(threads, "_next", slowly)
    blocked = threads.submit(stop.wait, 20)
    assert took.wait(5)
    second = threads.submit(lambda: "second")
    go_on.set()
    assert second.result(5) == "second"
    stop.set()
    assert blocked.result(5)


def test_the_end_waits_for_nobody() -> None:
    threads = PluginThreads(2)
    threads.submit(time.sleep, 30)
    began = time.monotonic()
    threads.shutdown(wait=True)
    assert time.monotonic() - began < 5
    with pytest.raises(RuntimeError):
        threads.submit(print)


def test_idle_threads_go_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.plugins.executor.IDLE_SECONDS", 0.05)
    threads = PluginThreads(3)
    for _ in range(20):
        assert threads.submit(threading.get_ident).result(5) > 0
        time.sleep(0.04)
    time.sleep(0.5)
    assert threads._count == 0
    assert threads.submit(lambda: "again").result(5) == "again"
    threads.shutdown()
