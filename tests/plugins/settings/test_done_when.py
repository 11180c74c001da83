"""The numbers are those of "Done when" of the page on settings; 5 is in `test_every_page.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.plugins.settings import conftest as it
from tests.plugins.settings.conftest import Shelf


async def test_settings_1_a_change_rules_also_after_a_restart_until_it_is_reset(
    make_shelf: Callable[..., Any],
) -> None:
    shelf = await make_shelf()
    changed = (await shelf.put("shelf.high", 20)).json()
    assert (changed["value"], changed["source"], changed["version"]) == (20, "database", 1)
    assert changed["updated_by"] == shelf.admin.user["id"]
    assert (await shelf.admin.get("/settings")).json()["shelf"]["high"] == shelf.get(it.HIGH) == 20
    await shelf.kit.kernel.stop()
    again = await make_shelf()
    assert again.get(it.HIGH) == 20
    assert (await again.shown("shelf.high"))["value"] == 20
    reset = (await again.admin.post("/settings/shelf/high/reset")).json()
    assert (reset["value"], reset["source"], reset["version"]) == (10, "default", 2)
    assert again.get(it.HIGH) == 10


async def test_settings_2_one_bad_value_of_a_hundred_changes_nothing(make_shelf: Callable[..., Any]) -> None:
    from corral.plugin import Plugin, Setting, hookimpl

    many = [Setting(name=f"many.s{number}", kind=int, default=0, title="x", maximum=9) for number in range(100)]

    class ManyPlugin(Plugin):
        """Many settings."""

        name = "many"

        @hookimpl
        def corral_settings(self) -> list[Setting[Any]]:
            return list(many)

    shelf = await make_shelf(plugins=("settings", ManyPlugin))
    body: dict[str, Any] = {setting.name: 5 for setting in many}
    refused = await shelf.admin.put("/settings/bulk", {"settings": {**body, "many.s42": 10}})
    assert refused.status == 422
    assert [fault["pointer"] for fault in refused.json()["errors"]] == ["/settings/many.s42"]
    assert {shelf.get(setting) for setting in many} == {0}
    assert set((await shelf.admin.get("/settings?category=many")).json()["many"].values()) == {0}
    assert (await shelf.admin.get("/settings/history")).json()["total"] == 0
    assert len((await shelf.admin.put("/settings/bulk", {"settings": body})).json()["updated"]) == 100
    assert {shelf.get(setting) for setting in many} == {5}
    assert (await shelf.admin.put("/settings/bulk", {"settings": {**body, "many.s100": 5}})).status == 422


async def test_settings_3_another_process_hears_of_it(make_shelf: Callable[..., Any]) -> None:
    """Two kernels on one database, without a bus between them; with Redis: `test_processes.py`."""
    first, second = await make_shelf(), await make_shelf()
    for value in (20, 30, 40):
        assert (await first.put("shelf.high", value)).status == 200
        async with asyncio.timeout(60):
            while second.get(it.HIGH) != value:  # noqa: ASYNC110  (this is what is tested)
                await asyncio.sleep(0.02)
    await second.put("shelf.low", 7)
    assert (await first.shown("shelf.low"))["value"] == 7  # read from the rows, whatever rules here yet


async def test_settings_4_what_was_read_can_be_written_back(shelf: Shelf) -> None:
    await shelf.put("shelf.high", 20)
    await shelf.put("shelf.lock", "a secret code")
    values = (await shelf.admin.get("/settings")).json()
    assert values["shelf"]["lock"] == "********"
    flat = {f"{category}.{key}": value for category, keys in values.items() for key, value in keys.items()}
    masked = await shelf.admin.put("/settings/bulk", {"settings": {"shelf.high": 30, "shelf.lock": "********"}})
    assert (masked.status, masked.code) == (422, "masked_value_submitted")
    assert masked.json()["errors"][0]["pointer"] == "/settings/shelf.lock"
    assert (await shelf.put("shelf.lock", "****")).code == "masked_value_submitted"
    del flat["shelf.lock"]
    names = sorted(flat)
    for part in (names[:100], names[100:]):
        answer = await shelf.admin.put("/settings/bulk", {"settings": {name: flat[name] for name in part}})
        assert answer.json() == {"updated": [], "unchanged": part}
    assert (shelf.get(it.HIGH), shelf.get(it.LOCK)) == (20, "a secret code")
    assert (await shelf.admin.get("/settings/history")).json()["total"] == 2


async def test_settings_6_a_pinned_value_names_its_variable(make_shelf: Callable[..., Any]) -> None:
    shelf = await make_shelf(environ={"CORRAL_ACCESS_TTL": "600"}, config={"settings.shelf.high": 25})
    for value in (600, 700):
        refused = await shelf.put("security.access_ttl_seconds", value)
        assert (refused.status, refused.code) == (409, "setting_locked")
        assert "CORRAL_ACCESS_TTL" in refused.json()["detail"]
    shown = await shelf.shown("security.access_ttl_seconds")
    assert (shown["value"], shown["source"], shown["locked"]) == (600, "environment", True)
    assert shown["env"] == shown["pinned_by"] == "CORRAL_ACCESS_TTL"
    assert (await shelf.admin.post("/settings/security/access_ttl_seconds/reset")).code == "setting_locked"
    bulk = {"settings": {"shelf.low": 5, "shelf.high": 26}}
    refused = await shelf.admin.put("/settings/bulk", bulk)
    assert (refused.code, refused.json()["pinned_by"]) == ("setting_locked", ["command line"])
    assert (shelf.get(it.LOW), shelf.get(it.HIGH)) == (1, 25)
    same = await shelf.admin.put("/settings/bulk", {"settings": {"shelf.low": 5, "shelf.high": 25}})
    assert same.json() == {"updated": ["shelf.low"], "unchanged": ["shelf.high"]}


async def test_the_object_of_a_setting_tells_everything(shelf: Shelf) -> None:
    shown = await shelf.shown("shelf.high")
    assert shown == {
        "category": "shelf",
        "key": "high",
        "type": "int",
        "nullable": False,
        "default": 10,
        "min": 0,
        "max": 100,
        "schema": {"type": "integer", "minimum": 0, "maximum": 100, "default": 10, "title": "Upper end"},
        "title": "Upper end",
        "description": "",
        "restart_required": False,
        "own_session": False,
        "plugin": "shelf",
        "env": None,
        "value": 10,
        "source": "default",
        "locked": False,
        "pinned_by": None,
        "updated_at": None,
        "updated_by": None,
        "version": 0,
        "pending_restart": False,
        "invalid": None,
    }
    kinds = {"width": "number", "open": "bool", "wood": "enum", "label": "string", "books": "list", "lock": "secret"}
    answer = (await shelf.admin.get("/settings?category=shelf&details=true")).json()["shelf"]
    assert {key: answer[key]["type"] for key in kinds} == kinds
    assert answer["depths"]["type"] == "object"
    assert json.dumps(answer["label"]["schema"]) == json.dumps(
        {
            "anyOf": [
                {
                    "type": "string",
                    "minLength": 2,
                    "maxLength": 20,
                    "pattern": "^(?:[a-z ]*)$",
                    "default": None,
                    "title": "Label",
                },
                {"type": "null"},
            ],
            "title": "Label",
        }
    )
