"""Large outputs of steps become files of the person who started the run."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

import pytest
from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of, transform

from corral.testing.kit import Kit
from corral.testing.stub_servers import StubServer, http_response_bytes

LARGE = "x" * 400_000


@pytest.mark.one_engine
async def test_a_large_output_becomes_a_file(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    async with StubServer(http_response_bytes(200, LARGE.encode())) as remote:
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


@pytest.mark.one_engine
async def test_without_files_a_large_output_fails_its_step(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    async with StubServer(http_response_bytes(200, LARGE.encode())) as remote:
        kit = await make_kit(plugins=PLUGINS, config={"egress.allow": [f"127.0.0.1:{remote.port}"]})
        world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
        run = await world.run(step("call", "http", {"method": "GET", "url": remote.url}))
        assert (run["status"], run["error"]["type"]) == ("failed", "output_too_large")


async def test_large_outputs_of_the_engine_itself_become_files(make_kit: Callable[..., Awaitable[Kit]]) -> None:
    """A loop whose results are large together, a step that gathers large values, and the output of a child run."""
    kit = await make_kit(plugins=[*PLUGINS, "files"])
    world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
    text, parts = LARGE[:100_000], ["{{ input.text }}"] * 3
    child = await world.workflow(transform("part", text), config={"output": {"parts": parts}})
    each = transform("pick", "{{ input.text }}")
    run = await world.run(
        step("each", "loop", {"items": [1, 2, 3], "body": [each]}),
        transform("gather", parts),
        step("call", "workflow", {"workflow_id": child, "input": {"text": text}}),
        transform("told", "{{ has(steps.each.output.size) && has(steps.gather.output.size) }}"),
        input={"text": text},
    )
    assert run["status"] == "completed", run
    steps = steps_of(run)
    contents = {}
    for name in ("each", "gather", "call"):
        output = steps[name]["output"]
        assert output.keys() == {"$file", "size"}, output
        kept = await world.member.get(f"/files/{output['$file']}/download")
        contents[name] = json.loads(kept.body)
        assert len(kept.body) == output["size"] > 256 * 1024
    assert contents == {
        "each": {"results": [text] * 3, "errors": []},
        "gather": [text] * 3,
        "call": {"parts": [text] * 3},
    }
    assert steps["told"]["output"] is True
    usage = await world.ok("GET", "/files/usage")
    assert usage["files"] == 3
