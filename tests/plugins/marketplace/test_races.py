"""An edit while an installation is upgraded or removed. Only PostgreSQL runs units of work at the same time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.engines import POSTGRES
from tests.plugins.marketplace.conftest import PLUGINS, Market, manifest, objects
from tests.rival import Rival

pytestmark = POSTGRES
EDIT = "UPDATE agents_agents SET system_prompt = 'Mine.', version = version + 1 WHERE id = %s"


@pytest.fixture
async def market(make_kit: Callable[..., Any]) -> Market:
    kit = await make_kit(plugins=PLUGINS)
    return Market(kit, await kit.as_user("member"), await kit.as_user("admin"))


@pytest.fixture
async def rival(market: Market, database_url: str) -> AsyncIterator[Rival]:
    rival = Rival(database_url)
    yield rival
    rival.close()


async def test_an_edit_during_an_upgrade_is_kept(market: Market, rival: Rival) -> None:
    await market.upload()
    made = await market.install()
    newer = manifest(version="1.1.0")
    newer["resources"][0]["spec"]["system_prompt"] = "You sort well."
    await market.ok("POST", "/marketplace/templates", newer, by=market.admin)
    agent = objects(made)["sorter"]["id"]
    upgrade = market.ok("POST", f"/marketplace/installations/{made['id']}/upgrade", {})
    result = await rival.before(upgrade, EDIT, agent)
    assert [(each["key"], each["fields"]) for each in result["kept_local"]] == [("sorter", ["system_prompt"])]
    assert (await market.ok("GET", f"/agents/{agent}"))["system_prompt"] == "Mine."


async def test_an_object_that_is_edited_during_an_uninstallation_stays(market: Market, rival: Rival) -> None:
    await market.upload()
    made = await market.install()
    agent = objects(made)["sorter"]["id"]
    removal = market.ok("POST", f"/marketplace/installations/{made['id']}/uninstall", {})
    result = await rival.before(removal, EDIT, agent)
    assert [(each["key"], each["reason"]) for each in result["kept"]] == [("sorter", "edited")]
