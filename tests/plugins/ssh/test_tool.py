"""The tool `ssh.execute`: who may run a command by an agent, and after whose approval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.ssh.conftest import PASSWORD, USER, Machine
from tests.plugins.tools.conftest import World
from tests.plugins.workflows.conftest import PLUGINS as WORKFLOWS
from tests.plugins.workflows.conftest import step
from tests.plugins.workflows.test_tool_steps import Shop

pytestmark = pytest.mark.one_engine


@pytest.fixture
async def world(make_kit: Callable[..., Any], machine: Machine) -> World:
    extra = ("audit", "approvals", "secrets", "ssh")
    return await World().build(
        lambda **given: make_kit(
            **{**given, "plugins": [*extra, *given["plugins"]], "config": {"egress.allow": ["127.0.0.1"]}}
        )
    )


async def connection(world: World | Shop, machine: Machine, **fields: Any) -> str:
    body = {
        "name": "machine",
        "hostname": "127.0.0.1",
        "port": machine.port,
        "username": USER,
        "auth_method": "password",
        "password": PASSWORD,
        "host_key_policy": "strict",
        "host_key": machine.key_line,
        **fields,
    }
    made = await world.admin.post("/ssh-connections", body)
    assert made.status == 201, made
    return str(made.json()["id"])


async def claimed(world: World, by: Any, connections: list[str] | None) -> Any:
    """A run that `by` requested. The tool admits the connections."""
    if connections is not None:
        answer = await world.admin.patch("/tools/ssh.execute", {"config": {"connection_ids": connections}})
        assert answer.status == 200, answer
    agent_id = await world.agent("ssh.execute", tool_policy={"ssh.execute": "allow"}, by=world.admin)
    answer = await by.post("/tasks", {"title": "work", "agent_id": agent_id})
    assert answer.status == 201, answer
    return await world.claim(agent_id)


async def test_without_a_list_of_connections_no_machine_is_admitted(world: World, machine: Machine) -> None:
    target = await connection(world, machine, require_approval=False)
    run = await claimed(world, world.admin, None)
    answer = await run.tool("ssh.execute", {"connection_id": target, "command": "id"})
    assert (answer.status, answer.json()["reason"]) == (403, "config")
    assert machine.connections == 0


async def test_an_admin_lets_an_agent_run_commands(world: World, machine: Machine) -> None:
    target = await connection(world, machine, require_approval=False, denied_commands=["rm *"])
    run = await claimed(world, world.admin, [target])
    denied = await run.tool("ssh.execute", {"connection_id": target, "command": "rm -r x"})
    assert denied.json()["error"]["type"] == "command_denied", denied
    answer = await run.tool("ssh.execute", {"connection_id": target, "argv": ["echo", "it's done"]})
    assert answer.status == 200, answer
    assert answer.json()["result"]["stdout"] == "it's done\n"
    tainted = await run.tool("ssh.execute", {"connection_id": target, "command": "id"})
    assert (tainted.status, tainted.json()["status"]) == (202, "pending_approval")  # the output was untrusted
    rows = (await world.admin.get(f"/ssh-connections/{target}/executions")).json()["items"]
    assert [(row["actor"].partition(":")[0], row["task_id"], row["status"]) for row in rows] == [
        ("agent", run.task_id, "completed")
    ]


@pytest.mark.parametrize("who", ["admin", "member"])
async def test_a_person_is_asked_if_the_connection_or_the_requester_demands_it(
    world: World, machine: Machine, who: str
) -> None:
    target = await connection(world, machine, require_approval=who == "admin")
    by = world.admin if who == "admin" else world.member
    run = await claimed(world, by, [target])
    answer = await run.tool("ssh.execute", {"connection_id": target, "command": "echo approved"})
    assert answer.status == 202, answer
    assert machine.connections == 0
    (approval,) = (await world.admin.get("/approvals?status=pending")).json()["items"]
    counts = [(await each.get("/approvals/count")).json() for each in (world.admin, world.member)]
    assert [each["assigned_to_me"] for each in counts] == [1, 0]  # nobody is asked who may not decide
    by_member = await world.member.post(f"/approvals/{approval['id']}/approve", {})
    assert (by_member.status, machine.connections) == (403, 0), by_member
    assert (await world.admin.post(f"/approvals/{approval['id']}/approve", {})).status == 200
    await world.kit.run_jobs()
    rows: Any = []
    for _ in range(1000):
        rows = (await world.admin.get(f"/ssh-connections/{target}/executions")).json()["items"]
        if rows and rows[0]["status"] != "running":
            break
        await asyncio.sleep(0.05)
    assert [(row["command"], row["status"], row["approval_id"]) for row in rows] == [
        ("echo approved", "completed", approval["id"])
    ]


async def test_a_step_of_a_workflow_runs_a_command(
    make_kit: Callable[..., Any], machine: Machine, tmp_path: Path
) -> None:
    plugins = (*WORKFLOWS, "tools", "approvals", "secrets", "ssh")
    kit = await make_kit(plugins=plugins, config={"egress.allow": ["127.0.0.1"]})
    admin = await kit.as_user("admin")
    shop = await Shop(kit, admin, admin).set_up(
        tmp_path / "worker", "ssh.execute", tool_policy={"ssh.execute": "allow"}
    )
    target = await connection(shop, machine, require_approval=False)
    await shop.ok("PATCH", "/tools/ssh.execute", {"config": {"connection_ids": [target]}})
    arguments = {"connection_id": target, "argv": ["echo", "{{ input.word }}"]}
    workflow_id = await shop.workflow(step("call", "tool", {"tool": "ssh.execute", "arguments": arguments}))
    run_id = await shop.start(workflow_id, {"word": "it's done"})
    await shop.settle()
    assert await shop.work() == ["completed"]
    run = await shop.until(run_id)
    assert run["status"] == "completed", run["error"]
    (row,) = (await shop.ok("GET", f"/ssh-connections/{target}/executions"))["items"]
    assert (row["command"], row["status"]) == ("echo 'it'\"'\"'s done'", "completed")
