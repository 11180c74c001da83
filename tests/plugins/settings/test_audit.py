"""Every change leaves a row in the audit log, with the values before and after; of a secret it says `changed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.plugins.settings import conftest as it


async def test_changes_and_resets_are_recorded(make_shelf: Callable[..., Any]) -> None:
    shelf = await make_shelf(plugins=("settings", "audit", it.ShelfPlugin))
    await shelf.put("shelf.high", 20)
    await shelf.put("shelf.high", 20)  # no change, no row
    await shelf.put("shelf.high", 500)  # refused, no row
    await shelf.admin.post("/settings/shelf/high/reset")
    await shelf.put("shelf.lock", "a secret code")
    await shelf.admin.put("/plugins/shelf/config", {"settings": {"shelf.open": False}})
    rows = (await shelf.admin.get("/admin/audit?action=settings.*")).json()["items"]
    told = [(row["action"], row["object"]["id"], row["changes"]) for row in reversed(rows)]
    assert told == [
        ("settings.setting.update", "shelf.high", [{"field": "shelf.high", "from": 10, "to": 20}]),
        ("settings.setting.reset", "shelf.high", [{"field": "shelf.high", "from": 20, "to": 10}]),
        ("settings.setting.update", "shelf.lock", [{"field": "shelf.lock", "from": None, "to": "changed"}]),
        ("settings.setting.update", "shelf.open", [{"field": "shelf.open", "from": True, "to": False}]),
    ]
    assert {row["actor"]["id"] for row in rows} == {shelf.admin.user["id"]}
    (config,) = (await shelf.admin.get("/admin/audit?action=plugins.plugin.config")).json()["items"]
    assert (config["object"]["id"], config["details"]) == ("shelf", {"settings": ["shelf.open"]})
