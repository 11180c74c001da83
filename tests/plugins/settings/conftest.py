"""A plugin that declares one setting of each kind, and what it takes to look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from corral.plugin import Plugin, Setting, Settings, hookimpl
from corral.settings.validation import WebUrl
from corral.testing.kit import Client, Kit

LOW = Setting(
    name="shelf.low",
    kind=int,
    default=1,
    title="Lower end",
    minimum=0,
    maximum=100,
    check=lambda value, settings: None if value <= settings.get(HIGH) else "must not be above shelf.high",
)
HIGH: Setting[int] = Setting(name="shelf.high", kind=int, default=10, title="Upper end", minimum=0, maximum=100)
WIDTH = Setting(name="shelf.width", kind=float, default=1.5, title="Width", minimum=0.5, maximum=9)
OPEN = Setting(name="shelf.open", kind=bool, default=True, title="Whether it is open")
WOOD = Setting(name="shelf.wood", kind=str, default="oak", title="Wood", choices=("oak", "ash"))
LABEL: Setting[str | None] = Setting(
    name="shelf.label", kind=str, default=None, title="Label", minimum=2, maximum=20, pattern=r"[a-z ]*"
)
BOOKS: Setting[list[str]] = Setting(name="shelf.books", kind=list[str], default=[], title="Books", maximum=3)
DEPTHS: Setting[dict[str, int]] = Setting(name="shelf.depths", kind=dict[str, int], default={}, title="Depth by row")
LOCK: Setting[str | None] = Setting(name="shelf.lock", kind=str, default=None, title="Its code", secret=True)
SLOTS = Setting(name="shelf.slots", kind=int, default=4, title="Slots", restart_required=True)
SHOP: Setting[str | None] = Setting(name="shelf.shop", kind=WebUrl, default=None, title="Where it was bought")
ALL: tuple[Setting[Any], ...] = (LOW, HIGH, WIDTH, OPEN, WOOD, LABEL, BOOKS, DEPTHS, LOCK, SLOTS, SHOP)


class ShelfPlugin(Plugin):
    """A shelf."""

    name = "shelf"

    @hookimpl
    def corral_settings(self) -> list[Setting[Any]]:
        return list(ALL)


class Shelf:
    """A kernel with the plugins `settings` and `shelf`, and an admin of it."""

    def __init__(self, kit: Kit, admin: Client) -> None:
        self.kit, self.admin = kit, admin

    def get(self, setting: Setting[Any]) -> Any:
        """What a plugin reads now."""
        settings: Settings = self.kit.kernel.settings
        return settings.get(setting)

    async def put(self, name: str, value: Any, **options: Any) -> Any:
        """Change one setting."""
        return await self.admin.put(f"/settings/{name.replace('.', '/')}", {"value": value}, **options)

    async def shown(self, name: str) -> dict[str, Any]:
        """Everything about one setting."""
        category, _, key = name.partition(".")
        answer = await self.admin.get(f"/settings?category={category}&details=true")
        found: dict[str, Any] = answer.json()[category][key]
        return found


@pytest.fixture
def make_shelf(make_kit: Callable[..., Any]) -> Callable[..., Any]:
    """`shelf = await make_shelf(**options of make_kernel)`; several are processes of one installation."""

    async def make(plugins: tuple[Any, ...] = ("settings", ShelfPlugin), **options: Any) -> Shelf:
        return await shelf_of(await make_kit(plugins=list(plugins), **options))

    return make


async def shelf_of(kit: Kit) -> Shelf:
    """The shelf of a kernel, with an admin of its own."""
    return Shelf(kit, await kit.as_user("admin", f"admin{id(kit):x}@example.org"))


@pytest.fixture
async def shelf(make_shelf: Callable[..., Any]) -> Shelf:
    made: Shelf = await make_shelf()
    return made
