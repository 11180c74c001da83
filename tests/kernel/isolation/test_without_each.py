"""Done when 5, of the page on plugins: each ordinary built-in plugin may be out, with those that require it.

The suites of the areas take all of them; here every reading operation of what is left answers as it does otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral.config.model import Config
from corral.http.answers import Stream
from corral.plugins.discovery import Found, discover
from corral.testing.kit import Kit, make_kernel

FOUND = {item.name: item for item in discover(Config()) if item.built_in}
ORDINARY = sorted(name for name, item in FOUND.items() if not item.protection())


def requires(item: Found) -> set[str]:
    return set(item.load().requires)


def with_dependants(name: str) -> set[str]:
    """What cannot be there without it."""
    out, more = {name}, True
    while more:
        found = {each for each, item in FOUND.items() if requires(item) & out}
        more, out = not found <= out, out | found
    return out


async def reads(kit: Kit, without: set[str]) -> dict[str, int]:
    """The status of each read that needs no id, of the plugins that are left."""
    admin, found = await kit.as_user("admin"), {}
    for endpoint in kit.application.endpoints:
        route: Any = endpoint.route
        ends = Stream not in endpoint.signature.returned
        if route.method == "GET" and not route.path_parameters and route.plugin not in without and ends:
            answer = await admin.get(route.path, root=route.path == "/metrics")
            found[route.path] = answer.status
    return found


@pytest.mark.parametrize("name", ORDINARY)
async def test_plugins_5_the_rest_answers_without_one(tmp_path: Path, name: str) -> None:
    out = with_dependants(name)
    async with make_kernel(tmp_path, config={"plugins.disabled": [name]}) as kit:
        states = {item.name: item.state for item in kit.kernel.plugins if item.found.built_in}
        assert {each for each, state in states.items() if state != "active"} == out
        assert {states[each] for each in out - {name}} <= {"blocked"}
        found = await reads(kit, out)
        assert {path: status for path, status in found.items() if status >= 500} == {}
        assert sum(status == 200 for status in found.values()) > 20
        document = (await kit.client.get("/openapi.json")).json()["paths"]
        assert len(document) > 30
