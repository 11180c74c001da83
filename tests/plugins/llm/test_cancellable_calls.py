"""The tasks of calls: what is protected runs to its end, however often the task is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from corral_plugins.llm.service.cancellable_calls import CallTask, CallTasks

pytestmark = pytest.mark.one_engine


class Steps:
    """A task that stops in a protected part, and then in one that is not."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reached, self.proceed, self.unprotected = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.done: list[str] = []
        self._error = error

    async def run(self, task: CallTask[None]) -> None:
        with task.protected():
            self.reached.set()
            await self.proceed.wait()
            self.done.append("protected")
            if self._error is not None:
                raise self._error
        self.unprotected.set()
        await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("error", [None, ValueError("the protected part failed")])
async def test_a_protected_part_is_not_cancelled(error: Exception | None) -> None:
    steps = Steps(error)
    started = CallTasks().start(steps.run)
    await steps.reached.wait()
    for _ in range(2):
        started.cancel()
        await asyncio.sleep(0)
    assert not started.task.done()
    steps.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await started.task
    assert steps.done == ["protected"]
    assert not steps.unprotected.is_set()


async def test_the_rest_of_a_task_is_cancelled_at_once() -> None:
    steps = Steps()
    steps.proceed.set()
    started = CallTasks().start(steps.run)
    await steps.unprotected.wait()
    started.cancel()
    with pytest.raises(asyncio.CancelledError):
        await started.task


async def test_stop_waits_for_protected_parts() -> None:
    tasks, steps = CallTasks(), Steps()
    tasks.start(steps.run)
    await steps.reached.wait()
    stopping = asyncio.ensure_future(tasks.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    steps.proceed.set()
    await stopping
    assert steps.done == ["protected"]


async def test_an_error_that_nobody_waits_for_is_not_reported(caplog: Any) -> None:
    async def fail(_: CallTask[None]) -> None:
        raise ValueError("refused")

    tasks = CallTasks()
    tasks.start(fail)
    await tasks.stop()
    assert caplog.records == []
