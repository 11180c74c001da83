"""The threads of a process: half of them for one plugin at most, none lost for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any
from unittest.mock import create_autospec

import pytest

from corral.errors import ContributionFailed
from corral.plugins.thread_pool import PluginThreads, acting_plugin
from corral.watchdog import GuardedFunction, ThreadAbandoned, Watchdog


@pytest.fixture
def threads() -> Iterator[PluginThreads]:
    watchdog = Watchdog()
    made = PluginThreads(watchdog, 4)
    yield made
    made.shutdown()
    watchdog.stop()


def of(name: str | None, threads: PluginThreads, call: Callable[[], Any]) -> Future[Any]:
    token = acting_plugin.set(name)
    try:
        return threads.submit(call)
    finally:
        acting_plugin.reset(token)


def test_values_and_errors_come_back(threads: PluginThreads) -> None:
    assert [threads.submit(pow, 2, n).result(60) for n in range(20)] == [2**n for n in range(20)]
    with pytest.raises(SystemExit):
        threads.submit(lambda: (_ for _ in ()).throw(SystemExit(1))).result(60)
    assert threads.submit(lambda: threading.current_thread().daemon).result(60)


def test_one_plugin_has_half_of_them(threads: PluginThreads) -> None:
    stop, running = threading.Event(), []

    def block() -> None:
        running.append(1)
        stop.wait(120)

    blocked = [of("slow", threads, block) for _ in range(10)]
    assert of(None, threads, lambda: "core").result(60) == "core"
    assert of("other", threads, lambda: "other").result(60) == "other"
    end = time.monotonic() + 60
    while len(running) < threads.shares.limit:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(running) == threads.shares.limit == 2
    stop.set()
    for each in blocked:
        each.result(60)
    assert len(running) == 10  # the rest waited and was done


def test_an_abandoned_thread_is_replaced(threads: PluginThreads) -> None:
    inside: list[threading.Thread] = []
    stop, guard = threading.Event(), create_autospec(GuardedFunction, instance=True, plugin="slow", where="it")

    def block() -> None:
        inside.append(threading.current_thread())
        stop.wait(120)

    blocked = [of("slow", threads, block) for _ in range(4)]
    end = time.monotonic() + 60
    while len(inside) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    for thread in tuple(inside):
        threads.abandon(thread, guard)
    for each in blocked[:2]:
        with pytest.raises(ContributionFailed, match="it did not return in time"):
            each.result(60)
    assert [threads.submit(lambda n=n: n).result(60) for n in range(4)] == [0, 1, 2, 3]
    stop.set()
    for each in blocked[2:]:
        each.result(60)


def test_a_call_that_counted_on_a_busy_thread_gets_another(
    threads: PluginThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has its task already and is still counted as idle when the next call comes."""
    took, go_on, stop = threading.Event(), threading.Event(), threading.Event()
    take = threads._next_task

    def slowly() -> Any:
        task = take()
        took.set()
        go_on.wait(60)
        return task

    monkeypatch.setattr(threads, "_next_task", slowly)
    blocked = threads.submit(stop.wait, 20)
    assert took.wait(60)
    second = threads.submit(lambda: "second")
    go_on.set()
    assert second.result(60) == "second"
    stop.set()
    assert blocked.result(60)


def test_a_thread_that_has_ended_is_not_abandoned_in_the_place_of_another() -> None:
    """A new thread gets the number of one that has ended. An exception before it has begun would hang who starts it."""
    for _ in range(20):  # a thread of an earlier test may get the number instead
        if _numbers_meet():
            return
    pytest.fail("this system numbers threads in another way")


def _numbers_meet() -> bool:
    """Abandon a thread that has ended. Return whether one of those that started after it has its number."""
    watchdog, stop, harmed = Watchdog(), threading.Event(), list[threading.Thread]()
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()

    def work() -> None:
        try:
            while not stop.wait(0.01):
                continue
        except ThreadAbandoned:
            harmed.append(threading.current_thread())

    others = [threading.Thread(target=work) for _ in range(20)]
    for other in others:
        other.start()
    watchdog.abandon(ended, None)
    time.sleep(0.1)
    stop.set()
    for other in others:
        other.join()
    watchdog.stop()
    assert harmed == []
    return ended.ident in {other.ident for other in others}


def test_the_end_waits_for_nobody() -> None:
    threads = PluginThreads(Watchdog(), 2)
    threads.submit(time.sleep, 30)
    began = time.monotonic()
    threads.shutdown(wait=True)
    assert time.monotonic() - began < 25
    with pytest.raises(RuntimeError):
        threads.submit(print)


FINALIZERS_WHILE_LOOKING = """
import gc, threading, time
from corral.watchdog import running_call_of

class Slow:
    def __del__(self):
        time.sleep(0.002)  # the other thread goes on

def deep(levels):
    return deep(levels - 1) + 1 if levels else 0

def work():
    while True:
        deep(800)

thread = threading.Thread(target=work, daemon=True)
thread.start()
ends = time.monotonic() + 2
while time.monotonic() < ends:
    gc.disable()
    cycle = [Slow()]
    cycle.append(cycle)
    del cycle
    gc.set_threshold(100)  # collect on the way through the stack
    gc.enable()
    running_call_of(thread.ident)
    gc.set_threshold(1_000_000)
assert thread.is_alive()
"""


GARBAGE_WHILE_LOOKING = """
import gc, threading
from corral.watchdog import running_call_of

thread = threading.get_ident()
for number in range(200):
    gc.disable()
    cycle = [threading.local()]
    cycle[0].back = cycle
    del cycle
    gc.set_threshold(1 + number % 7)  # collect at one of the next allocations
    gc.enable()
    running_call_of(thread)
    gc.set_threshold(1000)
"""


@pytest.mark.one_engine
def test_the_watchdog_looks_at_threads_while_garbage_is_collected() -> None:
    """Before Python 3.11.9 the whole process would hang in `sys._current_frames`, so this is a process of its own."""
    subprocess.run([sys.executable, "-c", GARBAGE_WHILE_LOOKING], check=True, timeout=60)


@pytest.mark.one_engine
def test_the_watchdog_looks_at_threads_while_finalizers_run() -> None:
    """Before Python 3.12 the process would crash when a frame ended while `f_back` collected garbage."""
    subprocess.run([sys.executable, "-c", FINALIZERS_WHILE_LOOKING], check=True, timeout=60)
