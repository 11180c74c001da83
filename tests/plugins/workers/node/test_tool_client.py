"""Tools that run on the worker: requested, permitted, run, reported, and never started twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.plugins.workers.node.recorded import Refusal, Server, calls_tool, claim

from corral_plugins.workers.node import conversation
from corral_plugins.workers.node.task_process import LOST, REPORTED
from corral_plugins.workers.node.tools.builtin import TOOLS, tool_offers
from corral_plugins.workers.node.tools.workspace import Workspaces

PERMITTED = {"status": "permitted", "permit": "p1"}


def tools(*names: str) -> dict[str, Any]:
    return {"tools": [{**offer, "runs": "worker"} for offer in tool_offers(names)]}


def told(server: Server) -> str:
    """The result of the last call, as the model received it."""
    text: str = server.of("chat")[-1]["body"]["messages"][-1]["content"]
    return text


@pytest.fixture
def workspaces(tmp_path: Path) -> Workspaces:
    return Workspaces(tmp_path / "spaces")


async def test_a_permitted_tool_runs_here_and_is_reported(workspaces: Workspaces) -> None:
    server = Server(calls_tool("shell__run", command="echo $((6*7))"), "end", tools={"shell.run": PERMITTED})
    given = claim(agent=tools("shell.run"))
    assert await server.run(given, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    (report,) = server.of("tool_result")
    assert report["permit"] == "p1"
    assert report["result"] == {"exit_code": 0, "output": "42\n", "timed_out": False}
    assert report["duration_ms"] >= 0
    assert '"output": "42\\n"' in told(server)
    assert server.of("chat")[0]["body"]["tools"][0]["function"]["description"].startswith("Run a command")


async def test_that_it_begins_is_kept_first(workspaces: Workspaces) -> None:
    server = Server(calls_tool("shell__run", command="true"), "end", tools={"shell.run": PERMITTED})
    await server.run(claim(agent=tools("shell.run")), allowed=["shell.run"], workspaces=workspaces)
    between = server.names[server.names.index("tool") : server.names.index("tool_result")]
    assert between == ["tool", "checkpoint"]
    kept = [checkpoint["state"]["running"] for checkpoint in server.of("checkpoint")]
    assert kept == [None, "c-shell__run", None]


async def test_workers_8_a_call_in_flight_is_not_run_twice(workspaces: Workspaces) -> None:
    """Interrupt a command; the next attempt asks for its outcome and does not start it again."""
    mark = workspaces.open_workspace("t1").path / "mark"
    command = f"echo x >> {mark}; sleep 30"
    first = Server(calls_tool("shell__run", command=command), tools={"shell.run": PERMITTED})
    given = claim(agent=tools("shell.run"))
    running = asyncio.ensure_future(first.run(given, allowed=["shell.run"], workspaces=workspaces))
    while not mark.exists():  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    second = Server("end", tools={"shell.run": PERMITTED})
    again = claim(agent=tools("shell.run"), resume={"checkpoint": first.of("checkpoint")[-1]})
    assert await second.run(again, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    assert second.of("tool_result")[0]["error"]["type"] == "outcome_unknown"
    assert "outcome_unknown" in told(second)
    assert first.of("tool")[0][1] == second.of("tool")[0][1]


async def test_a_result_that_was_reported_is_taken_as_it_is(workspaces: Workspaces) -> None:
    state = {
        "step": 1,
        "running": "c-shell__run",
        "messages": [
            *conversation.initial_messages(claim()),
            {"role": "assistant", **calls_tool("shell__run", command="false")},
        ],
    }
    server = Server("end", tools={"shell.run": {"status": "succeeded", "result": {"exit_code": 0}}})
    given = claim(agent=tools("shell.run"), resume={"checkpoint": {"step": 1, "state": state}})
    assert await server.run(given, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    assert told(server) == '{"exit_code": 0}'
    assert server.of("tool_result") == []


async def test_files_may_be_read_and_written_twice(workspaces: Workspaces) -> None:
    write = calls_tool("workspace__write", path="a.txt", content="hello")
    server = Server(write, calls_tool("workspace__read", path="a.txt"), calls_tool("workspace__list"), "end")
    names = ("workspace.read", "workspace.write", "workspace.list")
    server.tools = dict.fromkeys(names, PERMITTED)
    assert await server.run(claim(agent=tools(*names)), allowed=names, workspaces=workspaces) == REPORTED
    results = [report["result"] for report in server.of("tool_result")]
    assert results[0] == {"size_bytes": 5}
    assert results[1]["content"] == "hello"
    assert results[2]["entries"] == [{"name": "a.txt", "type": "file", "size_bytes": 5}]
    assert {checkpoint["state"]["running"] for checkpoint in server.of("checkpoint")} == {None}


async def test_a_permitted_call_runs_with_the_arguments_of_the_model(workspaces: Workspaces) -> None:
    """What the server shows of a call is redacted and cut; it is not what runs."""
    shown = {**PERMITTED, "arguments": {"path": "a.txt", "content": "hel[redacted]"}}
    server = Server(calls_tool("workspace__write", path="a.txt", content="hello"), "end")
    server.tools = {"workspace.write": shown}
    allowed = ("workspace.write",)
    assert await server.run(claim(agent=tools(*allowed)), allowed=allowed, workspaces=workspaces) == REPORTED
    assert server.of("tool_result")[0]["result"] == {"size_bytes": 5}


async def test_the_server_limits_the_time_of_a_command(workspaces: Workspaces) -> None:
    permitted = {**PERMITTED, "timeout_seconds": 1}
    server = Server(calls_tool("shell__run", command="sleep 60", timeout_seconds=50), "end")
    server.tools = {"shell.run": permitted}
    given = claim(agent=tools("shell.run"))
    assert await server.run(given, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    assert server.of("tool_result")[0]["result"]["timed_out"] is True


async def test_tools_3_an_approved_call_runs_with_the_arguments_of_the_approval(workspaces: Workspaces) -> None:
    held = {"status": "pending_approval", "approval_id": "a1"}
    first = Server(calls_tool("shell__run", command="rm -rf /"), tools={"shell.run": held})
    given = claim(agent=tools("shell.run"))
    assert await first.run(given, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    (waited,) = first.of("wait")
    edited = {**PERMITTED, "permit": "p2", "approved_arguments": {"command": "echo edited"}}
    second = Server("end", tools={"shell.run": edited})
    resume = {"checkpoint": waited["checkpoint"], "decision": {"status": "approved"}, "tool_results": []}
    again = claim(agent=tools("shell.run"), resume=resume)
    assert await second.run(again, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    assert len(second.of("tool")) == 1  # the server takes the decision again, and permits what people approved
    assert second.of("tool_result")[0]["permit"] == "p2"
    result, decision = second.of("chat")[-1]["body"]["messages"][-2:]
    assert (result["role"], "edited" in result["content"]) == ("tool", True)
    assert '"status": "approved"' in decision["content"]


async def test_a_tool_that_is_not_allowed_here_does_not_run(workspaces: Workspaces) -> None:
    server = Server(calls_tool("shell__run", command="true"), "end", tools={"shell.run": PERMITTED})
    given = claim(agent=tools("shell.run"))
    assert await server.run(given, allowed=["workspace.read"], workspaces=workspaces) == REPORTED
    assert server.of("tool_result")[0]["error"]["type"] == "not_offered"


@pytest.mark.parametrize("arguments", [{}, {"command": 7}, {"command": "true", "more": 1}, {"command": ""}])
async def test_arguments_are_checked_here_too(arguments: dict[str, Any], workspaces: Workspaces) -> None:
    server = Server(calls_tool("shell__run", **arguments), "end", tools={"shell.run": PERMITTED})
    await server.run(claim(agent=tools("shell.run")), allowed=["shell.run"], workspaces=workspaces)
    assert "are not valid" in server.of("tool_result")[0]["error"]["message"]


@pytest.mark.parametrize("text", ["{", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 5000])
async def test_arguments_that_are_no_json_are_told(text: str) -> None:
    answer = calls_tool("x")
    answer["tool_calls"][0]["function"]["arguments"] = text
    server = Server(answer, "end")
    assert await server.run(claim()) == REPORTED
    assert server.of("tool") == []
    assert "The arguments are not valid: " in told(server)


async def test_characters_that_nobody_can_store_are_replaced() -> None:
    answer = calls_tool("x")
    answer["tool_calls"][0]["function"]["arguments"] = '{"a": "\\ud800 \\u0000"}'
    server = Server(answer, "end", tools={"x": {"status": "succeeded", "result": 1}})
    assert await server.run(claim()) == REPORTED
    assert server.of("tool")[0][2] == {"a": "\ufffd \ufffd"}


async def test_a_report_that_comes_too_late_takes_nothing_back(workspaces: Workspaces) -> None:
    server = Server(calls_tool("shell__run", command="echo done"), "end", tools={"shell.run": PERMITTED})
    server.outcomes["result"] = [Refusal(409, code="already_decided", detail="The permit is over.")]
    given = claim(agent=tools("shell.run"))
    assert await server.run(given, allowed=["shell.run"], workspaces=workspaces) == REPORTED
    assert "done" in told(server)
    server = Server(calls_tool("shell__run", command="echo done"), tools={"shell.run": PERMITTED})
    server.outcomes["result"] = [Refusal(409, code="lease_lost")]
    assert await server.run(given, allowed=["shell.run"], workspaces=workspaces) == LOST


async def test_a_server_tool_that_still_runs_is_waited_for() -> None:
    server = Server(calls_tool("slow"), "end", tools={"slow": Refusal(409, code="invalid_state")})
    server.outcomes["c-slow"] = [{"status": "running"}, {"status": "succeeded", "result": "here"}]
    assert await server.run(claim()) == REPORTED
    assert server.of("tool_outcome") == ["c-slow", "c-slow"]
    assert told(server) == "here"


async def test_the_kill_switch_gives_the_task_back_in_the_middle_of_tools() -> None:
    server = Server(calls_tool("x"), tools={"x": Refusal(503, code="kill_switch")})
    assert await server.run(claim()) == REPORTED
    assert server.of("release") == ["kill_switch"]
    assert server.of("checkpoint")[-1]["state"]["open_calls"] == ["c-x"]


async def test_a_denial_is_told_with_its_reason() -> None:
    refusal = Refusal(403, code="tools.denied", detail="The agent may not use it.", reason="not_enabled")
    server = Server(calls_tool("x"), "end", tools={"x": refusal})
    assert await server.run(claim()) == REPORTED
    assert "The agent may not use it." in told(server)


async def test_a_tool_that_asks_a_person_ends_the_attempt() -> None:
    server = Server(calls_tool("human__ask"), tools={"human.ask": {"status": "running"}})
    given = claim(agent={"tools": [{"name": "human.ask"}]})
    assert await server.run(given) == REPORTED
    assert server.names[-1] == "tool"


@pytest.mark.parametrize("status", ["denied", "expired"])
async def test_what_a_person_did_not_approve_is_told(status: str) -> None:
    state = {"messages": [*conversation.initial_messages(claim()), {"role": "assistant", **calls_tool("x")}]}
    told_later = {"call_id": "c-x", "status": status, "reason": None, "result": None, "error": None}
    server = Server("end")
    resume = {"checkpoint": {"step": 1, "state": {**state, "step": 1}}, "tool_results": [told_later]}
    assert await server.run(claim(resume=resume)) == REPORTED
    assert f'"type": "{status}"' in told(server)


async def test_what_is_wrong_with_arguments_is_told() -> None:
    errors = [{"pointer": "/path", "code": "required", "detail": "is missing"}]
    refusal = Refusal(422, code="validation_error", detail="1 place does not match.", errors=errors)
    server = Server(calls_tool("x"), "end", tools={"x": refusal})
    assert await server.run(claim()) == REPORTED
    assert "x: 1 place does not match. /path: is missing" in told(server)


async def test_long_names_are_short_on_the_wire_and_whole_at_the_server() -> None:
    names = [f"mcp.server.{'x' * 80}.{end}" for end in "ab"]
    server = Server("end")
    given = claim(agent={"tools": [{"name": name} for name in names]})
    await server.run(given)
    wire = [tool["function"]["name"] for tool in server.of("chat")[0]["body"]["tools"]]
    assert len({*wire}) == 2
    assert all(len(name) <= 64 for name in wire)
    server = Server(calls_tool(wire[1]), "end", tools={names[1]: {"status": "succeeded", "result": "found"}})
    await server.run(given)
    assert told(server) == "found"


async def test_a_workspace_ends_with_its_task(workspaces: Workspaces) -> None:
    server = Server(calls_tool("workspace__write", path="a", content="x"), "end", tools={"workspace.write": PERMITTED})
    given = claim(agent=tools("workspace.write"))
    folder = workspaces.open_workspace("t1").path
    assert await server.run(given, allowed=["workspace.write"], workspaces=workspaces) == REPORTED
    assert not folder.exists()


def test_what_is_offered_says_what_it_takes() -> None:
    for offer in tool_offers(TOOLS):
        assert offer.keys() == {"name", "schema", "risk"}
        assert offer["schema"]["type"] == "object"
        assert offer["schema"]["additionalProperties"] is False
        assert offer["schema"]["description"]
        assert "$ref" not in str(offer["schema"])


async def test_a_tool_that_was_not_offered_is_called_by_its_own_name(workspaces: Workspaces) -> None:
    """So that the server refuses it as not offered, not as unknown."""
    server = Server(calls_tool("workspace__write", path="a.txt", content="hello"), "end")
    assert await server.run(claim(), workspaces=workspaces) == REPORTED
    assert server.of("tool")[0][0] == "workspace.write"
