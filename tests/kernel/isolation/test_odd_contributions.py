"""What a plugin contributes that is none: it fails alone and is told why; everybody else comes up and answers."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest

from corral import kernel
from corral.auth.principal import Permission
from corral.events.consumers import Subscriber
from corral.events.event import Event
from corral.http.routes import Socket
from corral.jobs.job import Job, Schedule
from corral.plugin import Metric, Plugin, Runtime, hookimpl
from corral.testing.kit import make_kernel

PLURAL = (
    "services",
    "routes",
    "sockets",
    "models",
    "events",
    "subscribers",
    "jobs",
    "schedules",
    "settings",
    "gates",
    "authenticators",
    "health_checks",
    "metrics",
    "hookspecs",
)


class Nameless(Event, kw_only=True):
    """Something happened."""


class Numbered(Event, kw_only=True):
    """Something happened."""

    event = 5  # type: ignore[assignment]  # what the test is about


def specs(**hooks: Any) -> types.ModuleType:
    module = types.ModuleType("specs")
    vars(module).update({name: pluggy.HookspecMarker("corral")(hook) for name, hook in hooks.items()})
    return module


def nothing() -> Any:
    """A hook, job or schedule."""


ODD: dict[str, tuple[str, list[Any], str]] = {
    **{f"number_among_{hook}": (hook, [42], "42") for hook in PLURAL},
    "nameless": ("events", [Nameless], 'Nameless has no name: set event = "nameless.happened"'),
    "numbered": ("events", [Numbered], "Numbered has no name"),
    "instance": ("models", [object()], "which is no"),
    "job_without_name": ("jobs", [Job(5, nothing)], "Expected `str`, got `int` - at `$.name`"),  # type: ignore[arg-type]  # so below
    "job_with_a_long_name": ("jobs", [Job("x" * 101, nothing)], "length <= 100 - at `$.name`"),
    "job_without_function": ("jobs", [Job("x", None)], "at `$.run`"),  # type: ignore[arg-type]
    "schedule_in_words": ("schedules", [Schedule("x", "5", nothing)], "at `$.every`"),  # type: ignore[arg-type]
    "schedule_never": ("schedules", [Schedule("x", float("inf"), nothing)], "at `$.every`"),
    "schedule_always": ("schedules", [Schedule("x", 0, nothing)], "at `$.every`"),
    "letters": ("subscribers", [Subscriber("x", "task.completed", nothing)], "at `$.events`"),  # type: ignore[arg-type]
    "hook_of_the_kernel": ("hookspecs", [specs(corral_routes=nothing)], "not existing ones: ['corral_routes']"),
    "hook_of_tools": ("hookspecs", [specs(corral_tools=nothing)], "not existing ones: ['corral_tools']"),
    "misnamed_series": ("metrics", [Metric(name="a b{", help="", collect=dict)], "at `$.name`"),
    "socket_nowhere": ("sockets", [Socket("live", nothing)], "at `$.path`"),
    "no_hooks": ("hookspecs", [specs()], "must add new hooks"),
}
MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "requires_lists": ({"requires": (["tasks"],)}, "tuples of names"),
    "of_nowhere": ({"__module__": "nowhere.at_all"}, "is a built-in class"),
    "wants_numbers": ({"wants": (5,)}, "tuples of names"),
    "held_by_a_number": ({"permissions": (Permission("held_by_a_number.x", "X", 5),)}, "at `$.holders`"),  # type: ignore[arg-type]
}


def contributing(name: str, hook: str, items: list[Any]) -> type[Plugin]:
    return type(name, (Plugin,), {"name": name, f"corral_{hook}": hookimpl(lambda self: items)})


def classes() -> Iterator[type[Plugin]]:
    for name, (hook, items, _) in ODD.items():
        yield contributing(name, hook, items)
    for name, (manifest, _) in MANIFESTS.items():
        yield type(name, (Plugin,), {"name": name, **manifest})


async def test_each_fails_alone_and_is_told_why(tmp_path: Path) -> None:
    reasons = {name: reason for name, (*_, reason) in ODD.items()} | {
        name: told for name, (_, told) in MANIFESTS.items()
    }
    async with make_kernel(tmp_path, plugins=["audit", "security", "tools", *classes()]) as kit:
        others = {loaded.name: loaded.reason for loaded in kit.kernel.plugins if loaded.name not in reasons}
        assert set(others.values()) == {None}, others
        for name, reason in reasons.items():
            loaded = kit.loaded(name)
            assert (loaded.state, reason in str(loaded.reason)) == ("failed", True), loaded.reason
        admin = await kit.as_user("admin")
        for path in ("/plugins", "/openapi.json", "/tools", "/events/types"):
            assert (await admin.get(path)).status == 200, path


async def test_a_start_that_ends_in_no_way_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    went_on = asyncio.Event()

    class HangingPlugin(Plugin):
        """Hanging: its start never ends."""

        name = "hanging"

        async def start(self, runtime: Runtime) -> None:
            runtime.supervise("task", self.task)
            await asyncio.Event().wait()

        async def task(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                went_on.set()

    class CancelledPlugin(Plugin):
        """Cancelled: as if somebody else had ended the boot."""

        name = "cancelled"

        async def start(self, runtime: Runtime) -> None:
            raise asyncio.CancelledError

    monkeypatch.setattr(kernel, "START_SECONDS", 0.2)
    async with asyncio.timeout(60), make_kernel(tmp_path, plugins=[HangingPlugin, CancelledPlugin]) as kit:
        hanging, cancelled = kit.loaded("hanging"), kit.loaded("cancelled")
        assert (hanging.state, hanging.reason) == ("failed", "start() took longer than 0.2 s")
        assert (cancelled.state, cancelled.reason) == ("failed", "CancelledError:")
        assert went_on.is_set()  # its background task was ended with it
