"""Threads that plugins begin and that die of an error."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from tests.kernel.isolation.misbehaving import plugin, routes, until

from corral.testing.kit import make_kernel


def die() -> None:
    raise LookupError("nobody caught this")


async def test_the_plugin_whose_code_raised_is_held(tmp_path: Path) -> None:
    kind = plugin("mortal", corral_routes=lambda self: [routes("mortal")])
    async with make_kernel(tmp_path, plugins=[kind]) as kit:
        mortal = next(item for item in kit.kernel.plugins if item.name == "mortal")
        for _ in range(9):
            leaving = threading.Thread(target=sys.exit)
            leaving.start()
            leaving.join()
        assert mortal.state == "active"  # one that ends itself is no error
        for number in range(5):
            threading.Thread(target=die, name=f"t{number}").start()
        await until(lambda: mortal.state == "quarantined")
        assert "thread t" in (mortal.reason or "")
        assert "LookupError: nobody caught this" in (mortal.reason or "")
        assert (await kit.client.get("/health/ready", root=True)).status == 200


async def test_errors_of_others_go_where_they_went_before(tmp_path: Path, monkeypatch: Any) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    before = threading.excepthook
    async with make_kernel(tmp_path, plugins=[]):
        assert threading.excepthook is not before
        thread = threading.Thread(target=die)
        thread.start()
        thread.join()
        assert [args.exc_type for args in told] == [LookupError]
    assert threading.excepthook is before
