"""Settings that rule from the next start: told as pending until every process runs the new value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.plugins.settings import conftest as it
from tests.plugins.settings.conftest import Shelf, ShelfPlugin, shelf_of

from corral import clock
from corral.testing.kit import make_kernel
from corral_plugins.settings.models import OutdatedProcessRow
from corral_plugins.settings.service.reloading import FORGET_SECONDS, PROPAGATION_SECONDS, LiveSettings


async def refreshed(shelf: Shelf) -> None:
    """As the process does by itself each second."""
    await shelf.kit.kernel.container.get(LiveSettings).apply_newer_values()


async def test_the_old_value_rules_until_the_next_start(
    make_shelf: Callable[..., Any], tmp_path: Path, unmade_database_url: str
) -> None:
    shelf = await make_shelf()
    changed = (await shelf.put("shelf.slots", 8)).json()
    assert (changed["value"], changed["pending_restart"], changed["restart_required"]) == (8, True, True)
    assert shelf.get(it.SLOTS) == 4
    async with make_kernel(tmp_path, plugins=["settings", ShelfPlugin], database_url=unmade_database_url) as kit:
        again = await shelf_of(kit)
        assert again.get(it.SLOTS) == 8
        assert (await again.shown("shelf.slots"))["pending_restart"] is True  # the first process still has the old one
        await shelf.put("shelf.slots", 4)
        clock.travel(PROPAGATION_SECONDS + 1)
        for each in (shelf, again):
            await refreshed(each)
        assert (await shelf.shown("shelf.slots"))["pending_restart"] is True  # now the second one has another
    assert (await shelf.shown("shelf.slots"))["pending_restart"] is False


async def test_a_process_that_was_killed_is_forgotten(shelf: Shelf) -> None:
    await shelf.put("shelf.slots", 8)
    await refreshed(shelf)
    rows = await shelf.kit.kernel.database.work(lambda: [row.names for row in OutdatedProcessRow.select()], read=True)
    assert rows == [["shelf.slots"]]
    await shelf.put("shelf.slots", 4)
    await refreshed(shelf)
    assert not await shelf.kit.kernel.database.work(lambda: OutdatedProcessRow.select().count(), read=True)

    def of_a_killed_process() -> None:
        OutdatedProcessRow.insert(process="gone", names=["shelf.slots"], seen_at=clock.now()).execute()

    await shelf.kit.kernel.database.work(of_a_killed_process)
    assert (await shelf.shown("shelf.slots"))["pending_restart"] is True
    clock.travel(FORGET_SECONDS + 1)
    assert (await shelf.shown("shelf.slots"))["pending_restart"] is False


async def test_looks_of_one_process_that_meet_write_one_row(shelf: Shelf) -> None:
    live, work = shelf.kit.kernel.container.get(LiveSettings), shelf.kit.kernel.database.work
    for _ in range(10):
        await asyncio.gather(*[work(lambda: live._write_outdated(["shelf.slots"])) for _ in range(4)])
    assert await work(lambda: [row.names for row in OutdatedProcessRow.select()], read=True) == [["shelf.slots"]]


async def test_while_the_database_does_not_answer_what_is_known_rules(shelf: Shelf) -> None:
    await shelf.put("shelf.high", 20)
    live = shelf.kit.kernel.container.get(LiveSettings)

    async def fails(*_: Any, **__: Any) -> Any:
        raise OSError("gone")

    work, live._work = live._work, fails
    following = asyncio.ensure_future(live.poll_changes())
    await asyncio.sleep(1.3)
    assert not following.done()
    assert shelf.get(it.HIGH) == 20
    live._work = work
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
