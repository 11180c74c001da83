"""The hook that `tasks` offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.plugins.tasks.conftest import World

from corral.plugin import Plugin, hookimpl


class Echo:
    """Handles tasks of people."""

    def handles(self, task: dict[str, Any]) -> bool:
        return bool(task["source"]["type"] == "user")

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        return {"tool": "echo", "task": task["id"]}


class EchoPlugin(Plugin):
    """Needs no agent loop."""

    name = "echo"
    wants = ("tasks",)

    @hookimpl(optionalhook=True)
    def corral_task_executors(self) -> Iterable[Echo]:
        return [Echo()]


async def test_corral_task_executors(make_kit: Callable[..., Any]) -> None:
    world = await World().build(await make_kit(plugins=("agents", "workers", "tasks", EchoPlugin)))
    task_id = await world.task()
    lease = await world.worker.claim()
    assert lease.claim["agent"]["config"]["executor"] == {"tool": "echo", "task": task_id}
