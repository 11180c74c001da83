"""Templates and installers that another plugin contributes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from tests.plugins.marketplace.conftest import MANIFEST, PLUGINS, TOKEN, Market, manifest, objects, plugin_with

from corral.auth.principal import Principal
from corral.errors import Invalid
from corral.ids import new_id
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit
from corral_plugins.marketplace.api import InstalledObject, Installer, ObjectUse

Json = dict[str, Any]


class Bells:
    """Objects without a table: bells that ring for an agent."""

    def __init__(self) -> None:
        self.rows: dict[str, Json] = {}

    def check_spec(self, spec: Json) -> None:
        if spec["tone"] == "z":
            raise Invalid.at("/tone", "not_allowed", "No bell has this tone.")

    def find_existing(self, names: Sequence[str]) -> Mapping[str, str]:
        return {row["name"]: bell for bell, row in self.rows.items() if row["name"] in names}

    def install(self, spec: Json, by: Principal) -> InstalledObject:
        bell = new_id()
        self.rows[bell] = dict(spec)
        return InstalledObject(id=bell)

    def read_fields(self, ids: Sequence[str]) -> Mapping[str, Json]:
        return {each: dict(self.rows[each]) for each in ids if each in self.rows}

    def remove(self, bell: str, by: Principal) -> None:
        del self.rows[bell]

    def find_uses(self, ids: Sequence[str]) -> Sequence[ObjectUse]:
        return [ObjectUse(id=bell, name=row["name"], uses=row["agent_id"]) for bell, row in self.rows.items()]


bells = Bells()


class BellsPlugin(Plugin):
    """Bells: contributes a kind of resource."""

    name = "bells"
    wants = ("marketplace",)

    @hookimpl(optionalhook=True)
    def corral_template_installers(self) -> Iterable[Installer]:
        text = {"type": "string"}
        schema = {"type": "object", "properties": {"name": text, "tone": text, "agent_id": text}, "required": ["tone"]}
        return [
            Installer(
                kind="bell",
                title="Bell",
                schema=schema,
                write="agents.write",
                read="agents.read",
                check_spec=bells.check_spec,
                find_existing=bells.find_existing,
                install=bells.install,
                read_fields=bells.read_fields,
                lock=lambda ids: None,
                update=lambda bell, fields, by: bells.rows[bell].update(fields),
                find_uses=bells.find_uses,
                find_running=lambda ids: [],
                remove=bells.remove,
                export=lambda bell, by: bells.rows[bell],
            )
        ]


async def _market(make_kit: Callable[..., Any], *plugins: type[Plugin]) -> Market:
    kit: Kit = await make_kit(plugins=(*PLUGINS, *plugins))
    return Market(kit, await kit.as_user("member"), await kit.as_user("admin"))


def _with_bell(**spec: Any) -> dict[str, Any]:
    changed = manifest()
    bell = {"name": "Bell", "tone": "a", "agent_id": {"$ref": "sorter"}, **spec}
    changed["resources"] = [{"kind": "bell", "key": "bell", "spec": bell}, changed["resources"][0]]
    return changed


async def test_corral_template_installers(make_kit: Callable[..., Any]) -> None:
    bells.rows.clear()
    market = await _market(make_kit, BellsPlugin)
    wrong = await market.admin.post("/marketplace/templates", _with_bell(tone="z"))
    assert wrong.json()["errors"][0]["pointer"] == "/resources/0/spec/tone"
    await market.ok("POST", "/marketplace/templates", _with_bell(), by=market.admin)
    made = await market.install()
    found = objects(made)
    assert list(found) == ["sorter", "bell"]  # the agent first, to which the bell refers
    assert bells.rows[found["bell"]["id"]]["agent_id"] == found["sorter"]["id"]
    path = f"/marketplace/installations/{made['id']}"
    bells.rows[found["bell"]["id"]]["tone"] = "b"
    result = await market.ok("POST", f"{path}/uninstall", {})
    assert {each["key"]: each["reason"] for each in result["kept"]} == {"bell": "edited", "sorter": "in_use"}
    result = await market.ok("POST", f"{path}/uninstall", {"force": True})
    assert [each["key"] for each in result["removed"]] == ["bell", "sorter"]
    assert bells.rows == {}


@pytest.mark.one_engine
async def test_a_kind_without_an_installer_is_named(market: Market) -> None:
    await market.ok("POST", "/marketplace/templates", _with_bell(), by=market.admin)
    shown = await market.ok("GET", "/marketplace/templates/sorter")
    assert (shown["installable"], [each["code"] for each in shown["problems"]]) == (False, ["plugin_required"])
    refused = await market.refused()
    assert (refused.status, refused.code, refused.json()["references"]) == (409, "plugin_required", ["bell"])
    plan = await market.install(dry_run=True)
    assert (plan["missing_plugins"], [each["key"] for each in plan["objects"]]) == (["bell"], ["sorter"])


@pytest.mark.one_engine
async def test_templates_of_plugins_are_refused_for_the_same_errors_as_uploads(make_kit: Callable[..., Any]) -> None:
    leaking, calling = manifest(slug="leaking"), manifest(slug="calling")
    leaking["resources"][0]["spec"]["system_prompt"] = f"Use {TOKEN}."
    calling["resources"][0]["spec"]["description"] = "See http://169.254.169.254/latest."
    market = await _market(make_kit, plugin_with(*(json.dumps(each).encode() for each in (leaking, calling))))
    shown = await market.ok("GET", "/marketplace/templates/leaking")
    assert (shown["installable"], [each["code"] for each in shown["problems"]]) == (False, ["marketplace.credential"])
    for slug, code in (("leaking", "marketplace.credential"), ("calling", "marketplace.blocked_url")):
        for dry_run in (True, False):
            refused = await market.refused(slug, dry_run=dry_run)
            assert (refused.status, [each["code"] for each in refused.json()["errors"]]) == (422, [code])


async def test_corral_template_sources(make_kit: Callable[..., Any]) -> None:
    stolen = {**MANIFEST, "slug": "hello-fleet", "version": "99.0.0"}
    nonsense = b"no manifest"
    older = {**MANIFEST, "version": "0.9.0", "changes": "First."}
    shelf = plugin_with(*(json.dumps(each).encode() for each in (older, MANIFEST, stolen)), nonsense)
    market = await _market(make_kit, shelf)
    found = await market.ok("GET", "/marketplace/templates?source=plugin:shelf")
    assert [(each["slug"], each["version"]) for each in found["items"]] == [("sorter", "1.0.0")]
    versions = await market.ok("GET", "/marketplace/templates/sorter/versions")
    assert [each["version"] for each in versions["items"]] == ["1.0.0", "0.9.0"]
    assert (await market.ok("GET", "/marketplace/templates/sorter?version=0.9.0"))["source"] == "plugin:shelf"
    assert (await market.ok("GET", "/marketplace/templates/hello-fleet"))["source"] == "bundled"
    taken = await market.admin.post("/marketplace/templates", manifest(version="2.0.0"))
    assert (taken.status, taken.code) == (409, "duplicate")
