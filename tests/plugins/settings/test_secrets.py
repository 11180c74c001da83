"""Secrets among settings: sealed in the database, masked everywhere else, known to the redactor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peewee
import pytest
from tests.limits import within
from tests.plugins.settings import conftest as it
from tests.plugins.settings.conftest import Shelf

from corral.database.sealed_columns import SealedColumns
from corral.testing.kit import make_kernel
from corral_plugins.settings.models import ValueRow

CODE = "xyzzy-plugh-0451"


async def test_a_secret_is_sealed_and_never_shown(shelf: Shelf) -> None:
    answers = [await shelf.put("shelf.lock", CODE)]
    assert answers[0].json()["value"] == "********"
    assert shelf.get(it.LOCK) == CODE
    for path in ("/settings", "/settings?details=true", "/settings/schema", "/settings/history", "/events"):
        answers.append(await shelf.admin.get(path))
    assert not [answer for answer in answers if CODE.encode() in answer.body]
    history = answers[4].json()["items"][0]
    assert (history["key"], history["from"], history["to"]) == ("lock", None, "changed")
    row = await shelf.kit.kernel.database.work(lambda: ValueRow.get_by_id("shelf.lock"), read=True)
    assert row.value is None
    assert bytes.fromhex(row.sealed).find(CODE.encode()) < 0


@pytest.mark.one_engine
async def test_the_redactor_hears_of_it_soon_and_not_on_the_loop(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    redactor = shelf.kit.kernel.redactor
    threads: list[threading.Thread] = []
    tell = redactor.set_values

    def noted(source: str, values: Mapping[str, str]) -> list[str]:
        threads.append(threading.current_thread())
        return tell(source, values)

    monkeypatch.setattr(redactor, "set_values", noted)
    await shelf.put("shelf.lock", CODE)
    async with within(2):
        while redactor.redact(f"the code is {CODE}.") != "the code is [redacted].":  # noqa: ASYNC110  (no bell)
            await asyncio.sleep(0.02)
    assert threads
    assert threading.main_thread() not in threads


async def test_its_column_is_counted_when_master_keys_change(shelf: Shelf) -> None:
    await shelf.put("shelf.lock", CODE)
    columns = shelf.kit.kernel.container.get(SealedColumns).columns
    assert "settings_values.sealed" in {column.name for column in columns}


async def test_null_forgets_it_and_the_same_again_is_no_change(shelf: Shelf) -> None:
    assert (await shelf.put("shelf.lock", CODE)).json()["version"] == 1
    assert (await shelf.put("shelf.lock", CODE)).json()["version"] == 1
    assert (await shelf.put("shelf.lock", None)).json()["value"] is None
    assert shelf.get(it.LOCK) is None
    async with within(2):
        while shelf.kit.kernel.redactor.redact(CODE) != CODE:  # noqa: ASYNC110  (no bell)
            await asyncio.sleep(0.02)


CUT = peewee.fn.SUBSTR(ValueRow.sealed, 1, 201)


@pytest.mark.parametrize("altered", [{"version": 7}, {"sealed": CUT}], ids=["from another place", "cut"])
async def test_a_value_that_does_not_open_is_ignored(make_shelf: Callable[..., Any], altered: dict[str, Any]) -> None:
    shelf = await make_shelf()
    await shelf.put("shelf.lock", CODE)

    def alter() -> None:
        ValueRow.update(altered).where(ValueRow.name == "shelf.lock").execute()

    await shelf.kit.kernel.database.work(alter)
    again = await make_shelf()
    assert again.get(it.LOCK) is None
    shown = await again.shown("shelf.lock")
    assert (shown["value"], shown["source"]) == (None, "default")
    assert "master keys" in shown["invalid"]
    assert (await again.put("shelf.lock", CODE)).json()["invalid"] is None


@pytest.mark.sqlite
async def test_the_database_file_does_not_hold_it(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=["settings", it.ShelfPlugin]) as kit:
        shelf = Shelf(kit, await kit.as_user("admin"))
        assert (await shelf.put("shelf.lock", CODE)).status == 200
    files = list((tmp_path / "data").glob("corral.db*"))
    assert files
    for path in files:
        assert CODE.encode() not in path.read_bytes(), path
