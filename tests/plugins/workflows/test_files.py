"""Large outputs of steps become files of the person who started the run."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of

from corral.testing.kit import Kit
from corral.testing.stub_servers import StubServer, http_response_bytes

LARGE = "x" * 400_000


async def test_a_large_output_becomes_a_file(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    async with StubServer(http_response_bytes("200 OK", LARGE.encode())) as remote:
        config = {"egress.allow": [f"127.0.0.1:{remote.port}"]}
        kit = await make_kit(plugins=[*PLUGINS, "files"], config=config)
        world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
        run = await world.run(step("call", "http", {"method": "GET", "url": remote.url}))
        assert run["status"] == "completed", run
        output = steps_of(run)["call"]["output"]
        assert output.keys() == {"$file", "size"}
        file = await world.ok("GET", f"/files/{output['$file']}")
        assert (file["size_bytes"], file["owner_id"]) == (output["size"], world.member.user["id"])
        assert (file["name"], file["source"]["type"], file["visibility"]) == ("call.json", "step", "private")
        kept = await world.member.get(f"/files/{output['$file']}/download")
        assert json.loads(kept.body)["body"] == LARGE


async def test_without_files_a_large_output_fails_its_step(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    async with StubServer(http_response_bytes("200 OK", LARGE.encode())) as remote:
        kit = await make_kit(plugins=PLUGINS, config={"egress.allow": [f"127.0.0.1:{remote.port}"]})
        world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
        run = await world.run(step("call", "http", {"method": "GET", "url": remote.url}))
        assert (run["status"], run["error"]["type"]) == ("failed", "output_too_large")
