"""Steps of the types `tool` and `code`: the worker's own program makes the call, under the lease of a task."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.plugins.tools.conftest import Bench, BenchPlugin, bench_of
from tests.plugins.workflows.conftest import PLUGINS, World, step, steps_of, transform

from corral.testing.kit import Client, Kit
from corral_plugins.tasks.api import Tasks
from corral_plugins.workers.node.client import WorkerApiClient
from corral_plugins.workers.node.tool_run import ToolRun
from corral_plugins.workers.node.tools.builtin import tool_offers
from corral_plugins.workers.node.tools.workspace import Workspaces

Json = dict[str, Any]


def call(tool: str = "test.write", arguments: Any = None, **fields: Any) -> Json:
    """A step that calls a tool."""
    config = {"tool": tool, "arguments": {"text": "{{ input.word }}"} if arguments is None else arguments}
    return step("call", "tool", config, **fields)


class Shop(World):
    """A world with tools, and a worker of which the test runs the program."""

    bench: Bench
    worker: Client
    worker_id: str
    agent_id: str
    folder: Path
    overloads = 0
    """The number of tool calls that the server will answer with 503."""

    async def set_up(self, folder: Path, *tools: str, **agent: Any) -> Shop:
        """Register a worker that runs Python, and start an agent with these tools."""
        self.folder = folder
        fields = {"name": "worker", "max_agents": 10, "tools": tool_offers(["python.run"])}
        made = await self.ok("POST", "/workers/register", fields, by=self.admin)
        self.worker_id, token = made["id"], made["token"]
        await self.ok("PATCH", f"/admin/workers/{self.worker_id}/approve", {"is_approved": True}, by=self.admin)
        self.worker = Client(self.kit.application.app, token)
        await self.ok("POST", f"/workers/{self.worker_id}/heartbeat", {}, by=self.worker)
        body = {"name": "agent", "enabled_tools": list(tools or ("test.*", "python.run")), **agent}
        self.agent_id = (await self.ok("POST", "/agents", body, by=self.admin))["id"]
        await self.ok("POST", f"/agents/{self.agent_id}/start", by=self.admin)
        return self

    async def claims(self) -> list[Json]:
        """Claim the next task."""
        claimed = await self.ok("POST", f"/workers/{self.worker_id}/claim", {}, by=self.worker)
        for claim in claimed["tasks"]:
            body = {"lease_id": claim["lease_id"]}
            await self.ok("POST", f"/tasks/{claim['task']['id']}/start", body, by=self.worker)
        found: list[Json] = claimed["tasks"]
        return found

    async def work(self) -> list[str]:
        """Let the worker run the tasks that it can claim. Return how they ended."""
        outcomes = []
        while claims := await self.claims():
            for claim in claims:
                outcomes.append(await self.attempt(claim))
            await self.settle()
        return outcomes

    async def attempt(self, claim: Json) -> str:
        """Run the program of the worker for a claim."""
        agent = Client(self.kit.application.app, claim["agent_token"])

        async def send(request: httpx2.Request) -> httpx2.Response:
            path = request.url.raw_path.decode()
            if self.overloads and "/tools/" in path:
                self.overloads -= 1
                problem = {"code": "dependency_unavailable", "detail": "The operation took too long."}
                return httpx2.Response(503, headers={"content-type": "application/problem+json"}, json=problem)
            answer = await agent.request(request.method, path, content=request.content or None)
            return httpx2.Response(answer.status, headers=answer.headers, content=answer.body)

        client = WorkerApiClient("http://server.invalid", claim["agent_token"], transport=httpx2.MockTransport(send))
        run = ToolRun(client, claim, set(), allowed=["python.run"], workspaces=Workspaces(self.folder))
        try:
            await run.run()
        finally:
            await client.close()
        return run.outcome


async def open_shop(make_kit: Callable[..., Awaitable[Kit]], folder: Path, *plugins: str) -> Shop:
    """Open a shop with these further plugins."""
    kit = await make_kit(plugins=(*PLUGINS, "tools", "approvals", BenchPlugin, *plugins))
    found = Shop(kit, await kit.as_user("member"), await kit.as_user("admin"))
    found.bench = bench_of(kit)
    return await found.set_up(folder / "worker")


@pytest.fixture
async def shop(make_kit: Callable[..., Awaitable[Kit]], tmp_path: Path) -> Shop:
    """A shop on each engine."""
    return await open_shop(make_kit, tmp_path)


@pytest.mark.one_engine
async def test_the_result_of_the_tool_is_the_output_of_the_step(shop: Shop) -> None:
    workflow_id = await shop.workflow(call(), transform("after", "{{ steps.call.output.said }}!"))
    run_id = await shop.start(workflow_id, {"word": "hi"})
    await shop.settle()
    assert await shop.work() == ["completed"]
    run = await shop.until(run_id)
    assert run["output"] == {"after": "hi!"}, run["error"]
    assert shop.bench.runs == [{"text": "hi"}]
    (context,) = shop.bench.contexts
    assert (context.caller.user_id, context.caller.agent_id) == (shop.member.user["id"], shop.agent_id)
    task = await shop.ok("GET", f"/tasks/{steps_of(run)['call']['task_id']}")
    assert (task["required_tools"], task["workflow_run_id"]) == (["test.write"], run_id)
    (made,) = (await shop.ok("GET", f"/tasks/{task['id']}/tool-calls"))["items"]
    assert (made["tool"], made["decision"], made["status"]) == ("test.write", "allowed", "succeeded")
    types = {each["type"]: each["plugin"] for each in (await shop.ok("GET", "/workflows/step-types"))["items"]}
    assert (types["tool"], types["code"]) == ("tools", "workflows")
    events = (await shop.ok("GET", f"/workflow-runs/{run_id}/events?limit=200"))["items"]
    told = {
        each["data"]["step"]: each["data"]["output_summary"] for each in events if each["event"] == "step.completed"
    }
    assert told == {"call": '{"said":"hi"}', "after": "hi!"}


@pytest.mark.one_engine
async def test_a_dangerous_call_waits_for_an_approval_and_runs_once_with_what_was_approved(shop: Shop) -> None:
    run_id = await shop.start(await shop.workflow(call("test.danger")), {"word": "rm"})
    await shop.settle()
    assert await shop.work() == ["waits for a person"]
    assert shop.bench.runs == []
    (asked,) = (await shop.ok("GET", "/approvals"))["items"]
    assert (asked["type"], (await shop.ok("GET", f"/approvals/{asked['id']}"))["payload"]) == (
        "tool_call",
        {"text": "rm"},
    )
    await shop.ok("POST", f"/approvals/{asked['id']}/approve", {"edited_payload": {"text": "ls"}})
    await shop.settle()
    assert await shop.work() == ["completed"]
    run = await shop.until(run_id)
    assert run["output"] == {"call": {"said": "ls"}}, run["error"]
    assert shop.bench.runs == [{"text": "ls"}]


@pytest.mark.one_engine
async def test_a_rejected_call_fails_the_step_with_the_note_and_is_not_made_again(shop: Shop) -> None:
    run_id = await shop.start(await shop.workflow(call("test.danger", on_error="continue")), {"word": "rm"})
    await shop.settle()
    await shop.work()
    (asked,) = (await shop.ok("GET", "/approvals"))["items"]
    await shop.ok("POST", f"/approvals/{asked['id']}/reject", {"note": "Not today."})
    await shop.settle()
    assert await shop.work() == ["failed: rejected"]
    run = await shop.until(run_id)
    error = steps_of(run)["call"]["error"]
    assert (run["status"], error["type"]) == ("completed", "rejected")
    assert "Not today." in error["message"]
    assert shop.bench.runs == []


@pytest.mark.one_engine
async def test_calls_that_policy_or_rights_deny_do_not_run(shop: Shop) -> None:
    policy = {"tool_policy": {"test.write": "deny"}}
    await shop.ok("PATCH", f"/agents/{shop.agent_id}", policy, by=shop.admin)
    run_id = await shop.start(await shop.workflow(call()), {"word": "hi"})
    await shop.settle()
    assert await shop.work() == ["failed: policy"]
    run = await shop.until(run_id)
    assert (run["status"], run["error"]["type"]) == ("failed", "policy")
    await shop.ok("PATCH", f"/agents/{shop.agent_id}", {"tool_policy": {}}, by=shop.admin)
    run_id = await shop.start(await shop.workflow(call()), {"word": "hi"})
    await shop.settle()
    (claim,) = await shop.claims()
    viewer = {"role": "viewer"}
    await shop.ok("PATCH", f"/admin/users/{shop.member.user['id']}", viewer, by=shop.admin)
    assert await shop.attempt(claim) == "failed: requester_lacks_permission"
    assert shop.bench.runs == []


@pytest.mark.one_engine
async def test_a_failed_call_is_made_again_as_the_retry_policy_says(shop: Shop) -> None:
    policy = {"max_attempts": 2, "initial_seconds": 0}
    run_id = await shop.start(await shop.workflow(call("test.fail", retry_policy=policy)), {"word": "hi"})
    await shop.settle()
    assert await shop.work() == ["failed: no_luck"] * 2
    run = await shop.until(run_id)
    assert (run["status"], run["error"]["type"]) == ("failed", "no_luck")
    assert len(shop.bench.runs) == 2


async def test_a_call_that_the_server_was_too_busy_to_make_is_made_by_the_next_attempt(shop: Shop) -> None:
    shop.overloads = 1
    policy = {"max_attempts": 2, "initial_seconds": 0}
    run_id = await shop.start(await shop.workflow(call(retry_policy=policy)), {"word": "hi"})
    await shop.settle()
    assert await shop.work() == ["failed: dependency_unavailable", "completed"]
    assert (await shop.until(run_id))["status"] == "completed"
    assert len(shop.bench.runs) == 1


@pytest.mark.one_engine
async def test_a_call_that_an_earlier_attempt_made_is_not_made_again(shop: Shop) -> None:
    run_id = await shop.start(await shop.workflow(call("test.write")), {"word": "hi"})
    await shop.settle()
    (claim,) = await shop.claims()
    task_id = claim["task"]["id"]
    agent = Client(shop.kit.application.app, claim["agent_token"])
    body = {"call_id": "step-1", "arguments": {"text": "hi"}}
    await shop.ok("POST", f"/tasks/{task_id}/tools/test.write", body, by=agent)
    lost = {"lease_id": claim["lease_id"], "reason": "the worker stopped"}
    await shop.ok("POST", f"/tasks/{task_id}/release", lost, by=shop.worker)
    assert await shop.work() == ["completed"]
    assert (await shop.until(run_id))["output"] == {"call": {"said": "hi"}}
    assert len(shop.bench.runs) == 1


@pytest.mark.one_engine
async def test_untrusted_output_taints_the_run(shop: Shop) -> None:
    steps = (call("test.page"), step("next", "tool", {"tool": "test.slow", "arguments": {"text": "x"}}))
    run_id = await shop.start(await shop.workflow(*steps), {"word": "obey me"})
    await shop.settle()
    assert await shop.work() == ["completed", "waits for a person"]
    assert (await shop.read(run_id))["status"] == "running"


async def call_after_a_failure(shop: Shop, *, tainted: bool) -> list[str]:
    """Let a run wait until a task fails, and then call an external tool. Return how the call ended."""
    arguments = {"text": "{{ steps.failure.output.event.data.error.message }}"}
    wait = step("failure", "wait", {"event": {"event": "task.failed"}})
    run_id = await shop.start(await shop.workflow(wait, call("test.slow", arguments)))
    await shop.until(run_id, "waiting")
    task_id = (await shop.ok("POST", "/tasks", {"title": "Read a page", "agent_id": shop.agent_id}))["id"]
    (claim,) = await shop.claims()
    if tainted:
        tasks = shop.kit.service(Tasks)
        await shop.kit.work(lambda: tasks.taint_run(task_id, claim["lease_id"], ["a test"]))
    error = {"type": "x", "message": "obey me"}
    body = {"lease_id": claim["lease_id"], "error": error, "retryable": False}
    await shop.ok("POST", f"/tasks/{task_id}/fail", body, by=shop.worker)
    await shop.kit.events()
    await shop.kit.run_schedule("workflows.sweep")
    await shop.settle()
    shop.bench.gate.set()
    ends = await shop.work()
    run = await shop.read(run_id)
    assert steps_of(run)["failure"]["output"]["event"]["data"]["error"]["message"] == error["message"]
    return ends


async def test_the_event_of_a_tainted_task_taints_the_run_that_waits_for_it(
    make_kit: Callable[..., Awaitable[Kit]], tmp_path: Path
) -> None:
    shop = await open_shop(make_kit, tmp_path, "triggers")
    assert await call_after_a_failure(shop, tainted=False) == ["completed"]
    assert shop.bench.runs == [{"text": "obey me"}]
    assert await call_after_a_failure(shop, tainted=True) == ["waits for a person"]
    assert len(shop.bench.runs) == 1
    (asked,) = (await shop.ok("GET", "/approvals"))["items"]
    assert (await shop.ok("GET", f"/approvals/{asked['id']}"))["tool_call"]["tainted"] is True


@pytest.mark.one_engine
async def test_without_triggers_each_event_taints_the_run_that_waits_for_it(shop: Shop) -> None:
    assert await call_after_a_failure(shop, tainted=False) == ["waits for a person"]


@pytest.mark.one_engine
async def test_code_gets_its_input_and_its_output_is_what_it_prints(shop: Shop) -> None:
    policy = {"tool_policy": {"python.run": "allow"}}
    await shop.ok("PATCH", f"/agents/{shop.agent_id}", policy, by=shop.admin)

    def code(source: str) -> Json:
        config = {"language": "python", "source": source, "input": {"n": "{{ input.n }}"}}
        return step("code", "code", config, retry_policy={"max_attempts": 1})

    run_id = await shop.start(
        await shop.workflow(code("print('working')\nprint(json.dumps({'doubled': input['n'] * 2}))")), {"n": 21}
    )
    await shop.settle()
    assert await shop.work() == ["completed"]
    assert (await shop.until(run_id))["output"] == {"code": {"doubled": 42}}
    for source, type in (("raise SystemExit(3)", "exit_code"), ("print('no JSON')", "invalid_output")):
        run_id = await shop.start(await shop.workflow(code(source)), {"n": 1})
        await shop.settle()
        assert await shop.work() == [f"failed: {type}"]
        assert (await shop.until(run_id))["error"]["type"] == type


@pytest.mark.one_engine
async def test_a_cancelled_run_cancels_the_task_of_a_person_who_was_deactivated(shop: Shop) -> None:
    run_id = await shop.start(await shop.workflow(call()), {"word": "hi"})
    await shop.settle()
    await shop.ok("PATCH", f"/admin/users/{shop.member.user['id']}", {"is_active": False}, by=shop.admin)
    await shop.ok("POST", f"/workflow-runs/{run_id}/cancel", {}, by=shop.admin)
    shop.member = shop.admin
    run = await shop.until(run_id)
    assert run["status"] == "cancelled"
    task = await shop.ok("GET", f"/tasks/{steps_of(run)['call']['task_id']}", by=shop.admin)
    assert task["status"] == "cancelled"


@pytest.mark.one_engine
async def test_secrets_are_refused_where_no_tool_resolves_them(shop: Shop) -> None:
    for tool, arguments, pointer in (
        ("test.write", {"text": "{{ secrets.KEY }}"}, "/steps/0/config/arguments/text"),
        ("http.fetch", {"url": "{{ secrets.KEY }}"}, "/steps/0/config/arguments/url"),
        ("http.fetch", {"url": "https://a.example", "headers": {"x-key": "{{ secrets.KEY }}"}}, None),
    ):
        answer = await shop.member.post("/workflows", {"name": "x", "steps": [call(tool, arguments)]})
        assert (answer.status == 201) == (pointer is None), answer
        if pointer is not None:
            assert answer.json()["errors"][0]["pointer"] == pointer


@pytest.mark.one_engine
async def test_without_the_plugin_tools_both_types_are_refused(world: World) -> None:
    steps = [call(), step("code", "code", {"language": "python", "source": "1"})]
    for each, code in zip(steps, ("unknown_reference", "not_allowed"), strict=True):
        answer = await world.member.post("/workflows", {"name": "x", "steps": [each]})
        assert (answer.status, answer.json()["errors"][0]["code"]) == (422, code)


@pytest.mark.one_engine
async def test_validate_and_dry_run_name_what_is_missing(shop: Shop) -> None:
    gone = (await shop.ok("POST", "/agents", {"name": "gone"}))["id"]
    headers = {"x-key": "{{ secrets.KEY }}"}
    body = [
        step("inner", "code", {"language": "ruby", "source": "1"}),
        step("known", "code", {"language": "python", "source": "1"}, agent_id=shop.agent_id),
    ]
    workflow_id = await shop.workflow(
        call("test.write"),
        step("ask", "agent", {"required_tools": ["test.*", "nothing.here"]}, agent_id=gone),
        step("send", "http", {"method": "GET", "url": "https://a.example", "headers": headers}),
        step("each", "loop", {"items": [1], "body": body}),
        step("computed", "tool", {"tool": "{{ input.tool }}"}),
    )
    await shop.ok("DELETE", f"/agents/{gone}")
    dry = await shop.ok("POST", f"/workflows/{workflow_id}/run", {"dry_run": True})
    assert dry["missing"] == {"secrets": ["KEY"], "tools": ["nothing.here", "ruby.run"], "agents": [gone]}
    found = await shop.ok("POST", f"/workflows/{workflow_id}/validate", {})
    assert found["valid"] is True
    assert [(each["step"], each["pointer"], each["code"]) for each in found["warnings"]] == [
        ("ask", "/steps/1/config/instructions", "required"),
        ("ask", "/steps/1/agent_id", "unknown_reference"),
        ("ask", "/steps/1/config/required_tools/1", "unknown_reference"),
        ("send", "/steps/2/config", "unknown_reference"),
        ("each", "/steps/3/config/body/0/config/language", "unknown_reference"),
    ]


@pytest.mark.one_engine
async def test_validate_warns_of_missing_steps_and_instructions(shop: Shop) -> None:
    """Without instructions the agent gets the title of the step, which may be all that it needs."""
    empty = await shop.workflow()
    (warning,) = (await shop.ok("POST", f"/workflows/{empty}/validate", {}))["warnings"]
    assert (warning["pointer"], warning["detail"]) == ("/steps", "The workflow has no steps, so it cannot run.")
    inner = [step("bare", "agent")]
    named = await shop.workflow(
        step("told", "agent", {"instructions": "Count to ten."}),
        step("titled", "agent", title="Count to eleven."),
        step("each", "loop", {"items": [1], "body": inner}),
    )
    (warning,) = (await shop.ok("POST", f"/workflows/{named}/validate", {}))["warnings"]
    assert warning["pointer"] == "/steps/2/config/body/0/config/instructions"
    assert warning["detail"].endswith("gets the name of the step instead: bare")


@pytest.mark.one_engine
async def test_validate_warns_of_a_tool_that_no_agent_may_use_for_its_step(shop: Shop) -> None:
    """The step would wait without a word. Which agent may use a tool follows from the step: its agent, or any one."""
    bare = (await shop.ok("POST", "/agents", {"name": "bare hands", "enabled_tools": ["files.read"]}))["id"]
    workflow_id = await shop.workflow(
        call("test.write", agent_id=bare),
        step("open", "tool", {"tool": "test.write"}),
        step("nobody", "tool", {"tool": "http.fetch"}),
        step("role", "agent", {"required_tools": ["test.write"], "agent_role": "reviewer"}, title="Review it."),
        step("computed", "agent", {"required_tools": ["test.write"], "agent_role": "{{ input.role }}"}, title="Do it."),
    )
    found = await shop.ok("POST", f"/workflows/{workflow_id}/validate", {})
    assert found["valid"] is True
    told = {each["step"]: (each["pointer"], each["code"], each["detail"]) for each in found["warnings"]}
    assert told.keys() == {"call", "nobody", "role"}
    place, code, detail = told["call"]
    assert (place, code) == ("/steps/0/config/tool", "not_allowed")
    assert detail.endswith("corral agents edit 'bare hands' --tool files.read --tool test.write")
    assert told["nobody"][2].startswith("No started agent may use the tool http.fetch")
    assert told["role"][0] == "/steps/3/config/required_tools/0"
    dry = await shop.ok("POST", f"/workflows/{workflow_id}/run", {"dry_run": True})
    assert dry["missing"]["tools"] == ["http.fetch", "test.write"]
