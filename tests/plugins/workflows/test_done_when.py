"""The criteria of the page on workflows, by number."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.limits import Stopwatch
from tests.plugins.workflows.conftest import PLUGINS, World, statuses, step, steps_of, transform

from corral import clock
from corral.testing.kit import make_kernel


def seconds(moment: str) -> float:
    """An instant of a response in seconds."""
    return clock.parse_instant(moment)


async def test_workflows_1_steps_of_one_order_run_at_the_same_time(world: World) -> None:
    workflow_id = await world.workflow()
    for name, order in (("first", 1), ("second", 2), ("third", 2)):
        config = {"prompt": "?"}
        body = {"name": name, "step_type": "input", "order": order, "config": config}
        made = await world.ok("POST", f"/workflows/{workflow_id}/steps", body)
        assert made["depends_on"] is None
    run_id = await world.start(workflow_id)
    run = await world.until(run_id, "waiting")
    assert statuses(run, "first", "second", "third") == ["waiting", "pending", "pending"]
    await world.ok("POST", f"/workflow-runs/{run_id}/steps/first/input", {"input": 1})
    await world.settle()
    run = await world.read(run_id)
    assert statuses(run, "first", "second", "third") == ["completed", "waiting", "waiting"]
    assert run["current_steps"] == ["second", "third"]


def items_and_concurrency(concurrency: int, on_item_error: str = "fail") -> dict[str, Any]:
    """A loop of 100 items, of which number 37 fails if `bad` is its index."""
    value = "{{ index == int(input.bad) ? 1 / 0 : item * 7 }}"
    body = [transform("one", "{{ item }}"), transform("two", value)]
    config = {"items": "{{ input.items }}", "body": body, "concurrency": concurrency, "on_item_error": on_item_error}
    return step("each", "loop", config)


async def test_workflows_3_the_output_of_a_loop_does_not_depend_on_its_concurrency(world: World) -> None:
    given = {"items": list(range(100)), "bad": -1}
    outputs = []
    for concurrency in (1, 20):
        run = await world.run(items_and_concurrency(concurrency), input=given)
        assert run["status"] == "completed", run["error"]
        outputs.append(json.dumps(run["output"]))
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0])["each"]["results"] == [n * 7 for n in range(100)]
    for concurrency in (1, 20):
        run = await world.run(items_and_concurrency(concurrency, "collect"), input={**given, "bad": 37})
        assert run["status"] == "completed", run["error"]
        output = run["output"]["each"]
        assert [error["index"] for error in output["errors"]] == [37]
        assert output["errors"][0]["error"]["type"] == "template_error"
        assert output["results"][36:39] == [252, None, 266]
    run = await world.run(items_and_concurrency(20), input={**given, "bad": 37})
    assert (run["status"], run["error"]["step"], run["error"]["type"]) == ("failed", "two", "template_error")


async def test_workflows_4_a_run_keeps_the_definition_with_which_it_started(world: World) -> None:
    ask = step("ask", "input", {"prompt": "?"})
    workflow_id = await world.workflow(ask, transform("after", "old"))
    run_id = await world.start(workflow_id)
    await world.until(run_id, "waiting")
    edited = {"steps": [ask, transform("after", "new"), transform("more", 1)]}
    changed = await world.ok("PATCH", f"/workflows/{workflow_id}", edited)
    assert changed["workflow_version"] == 2
    await world.ok("POST", f"/workflow-runs/{run_id}/steps/ask/input", {"input": 1})
    run = await world.until(run_id)
    assert run["output"] == {"after": "old"}
    assert [each["name"] for each in run["definition"]["steps"]] == ["ask", "after"]
    for definition, expected in (("original", {"after": "old"}), ("current", {"more": 1})):
        body = {"from": "after", "definition": definition}
        again = await world.ok("POST", f"/workflow-runs/{run_id}/retry", body)
        assert again["retry_of"] == run_id
        ended = await world.until(again["id"])
        assert ended["output"] == expected
        assert steps_of(ended)["ask"]["reused"] is True


async def test_workflows_6_a_retry_reuses_the_steps_before_the_failed_one(world: World) -> None:
    steps = (
        transform("first", "{{ now() }}"),
        transform("second", "{{ steps.first.output }} and {{ input.missing }}"),
        transform("third", "{{ steps.second.output }}"),
    )
    workflow_id = await world.workflow(*steps)
    run_id = await world.start(workflow_id)
    run = await world.until(run_id)
    assert run["status"] == "failed"
    assert statuses(run, "first", "second") == ["completed", "failed"]
    await world.ok("PATCH", f"/workflows/{workflow_id}", {"steps": [steps[0], transform("second", 2), steps[2]]})
    again = await world.ok("POST", f"/workflow-runs/{run_id}/retry", {"definition": "current"})
    ended = await world.until(again["id"])
    assert ended["status"] == "completed", ended["error"]
    found = steps_of(ended)
    assert [found[name]["reused"] for name in ("first", "second", "third")] == [True, False, False]
    assert found["first"]["output"] == steps_of(run)["first"]["output"]
    assert found["first"]["cost_usd"] == 0
    answer = await world.member.post(f"/workflow-runs/{ended['id']}/retry", {})
    assert answer.code == "invalid_state"


async def test_workflows_7_types_are_kept_and_absent_keys_fail_the_step(world: World) -> None:
    run = await world.run(transform("a", ["{{ input.n }}", "n={{ input.n }}"]), input={"n": 7})
    assert run["output"] == {"a": [7, "n=7"]}
    run = await world.run(transform("a", "{{ input.absent }}"), input={"n": 7})
    assert run["status"] == "failed"
    error = steps_of(run)["a"]["error"]
    assert error["type"] == "template_error"
    assert "input.absent" in error["message"]
    assert "character" in error["message"]


@pytest.mark.one_engine
async def test_workflows_9_cycles_and_references_to_later_steps_are_refused(world: World) -> None:
    needs = {"a": ["c"], "b": ["a"], "c": ["b"]}
    steps = [transform(name, 1, depends_on=needed) for name, needed in needs.items()]
    answer = await world.member.post("/workflows", {"name": "x", "steps": steps})
    assert (answer.status, answer.code) == (422, "cycle")
    path = answer.json()["errors"][0]["detail"].removeprefix("The steps form a cycle: ").removesuffix(".").split(" -> ")
    assert len(path) == 4
    assert path[0] == path[-1]
    assert all(before in needs[after] for before, after in itertools.pairwise(path))
    later = [transform("a", "{{ steps.b.output }}"), transform("b", 1)]
    answer = await world.member.post("/workflows", {"name": "x", "steps": later})
    assert (answer.status, answer.code) == (422, "unknown_reference")
    assert answer.json()["errors"][0]["pointer"] == "/steps/0/config/value"


@pytest.mark.one_engine
async def test_workflows_10_the_engine_adds_little_between_two_steps(world: World, long_form: bool) -> None:
    worked = time.process_time()
    run = await world.run(*(transform(f"s{n}", "{{ input.n + 1 }}") for n in range(100)), input={"n": 1})
    worked = time.process_time() - worked
    assert run["status"] == "completed"
    found = [steps_of(run)[f"s{n}"] for n in range(100)]
    gaps = sorted(
        seconds(after["started_at"]) - seconds(before["finished_at"]) for before, after in itertools.pairwise(found)
    )
    # Other tests share the machine: the short form counts the work.
    assert (gaps[94] if long_form else worked / 100) <= 0.05
    workflow_id = await world.workflow(step("pause", "wait", {"seconds": 3600}))
    began = time.process_time()
    ids = [await world.start(workflow_id) for _ in range(200)]
    await world.settle()
    listed = await world.ok("GET", f"/workflows/{workflow_id}/runs?status=waiting&limit=1")
    assert listed["total"] == len(ids)
    assert time.process_time() - began < 60


PATHS = {"approved": "after", "rejected": "other", "expired": "other", "cancelled": "other"}


async def test_workflows_5_every_outcome_of_an_approval_takes_its_path_after_a_restart(
    tmp_path: Path, unmade_database_url: str
) -> None:
    options: dict[str, Any] = {"plugins": [*PLUGINS, "approvals"], "database_url": unmade_database_url}
    asked: dict[str, tuple[str, str]] = {}
    async with make_kernel(tmp_path, **options) as kit:
        world = World(kit, await kit.as_user("member"), await kit.as_user("admin"))
        config = {"title": "Go on?", "on_reject": "goto:other", "expires_in_seconds": 900}
        workflow_id = await world.workflow(
            step("ask", "approval", config),
            transform("after", "after", depends_on=["ask"]),
            transform("other", "other", depends_on=[]),
        )
        for outcome in PATHS:
            run_id = await world.start(workflow_id)
            await world.until(run_id, "waiting")
            (approval,) = (await world.ok("GET", f"/approvals?run_id={run_id}"))["items"]
            asked[outcome] = (run_id, approval["id"])
        email = world.member.user["email"]
    async with make_kernel(tmp_path, **options) as kit:
        world = World(kit, await kit.sign_in(email), await kit.as_user("admin"))
        for outcome, action in (("approved", "approve"), ("rejected", "reject"), ("cancelled", "cancel")):
            await world.ok("POST", f"/approvals/{asked[outcome][1]}/{action}", {})
        clock.travel(901)
        await kit.run_schedule("approvals.sweep")
        world.member = await kit.sign_in(email)
        for outcome, path in PATHS.items():
            run = await world.until(asked[outcome][0])
            ends = {each["name"]: each["status"] for each in run["steps"]}
            skipped = "other" if path == "after" else "after"
            assert (run["status"], ends[path], ends[skipped]) == ("completed", "completed", "skipped"), (outcome, run)
    clock.reset()


def hostile() -> list[str]:
    """500 expressions that nest, grow, or look for attributes of Python objects."""
    kinds = (
        lambda n: "(" * n + "1" + ")" * n,
        lambda n: "[" * n + "1" + "]" * n,
        lambda n: "+".join(["input.n"] * (n * 8)),
        lambda n: f"input.items.map(x, input.items.map(y, x * y + {n}))",
        lambda n: f"size(input.text + input.text) > {n} ? input.text.matches('(a+)+b') : false",
        lambda n: f"input.__class__.__mro__[{n % 3}].__subclasses__()",
        lambda n: f"''.join(input.text, '{n}').format(input)",
        lambda n: f"steps.x{n}.output",
        lambda n: f"input.items.map(x, input.text + input.text + '{n}')",
        lambda n: f"{10**18} * {10**18 + n}",
    )
    return [kind(n) for n in range(1, 51) for kind in kinds]


@pytest.mark.one_engine
async def test_workflows_8_hostile_expressions_end_soon(world: World, long_form: bool) -> None:
    given = {"n": 1, "items": list(range(500)), "text": "a" * 2000}
    texts = hostile()
    accepted = 0
    for text in texts if long_form else texts[:60]:
        body = {"name": "hostile", "steps": [transform("a", "{{ " + text + " }}")]}
        with Stopwatch() as watch:
            answer = await world.member.post("/workflows", body)
            assert answer.status in (201, 422), answer
            run: Any = {"status": "completed", "error": None}
            if answer.status == 201:
                accepted += 1
                run = await world.until(await world.start(answer.json()["id"], given))
        error = run["error"] or {}
        assert run["status"] == "completed" or error["type"] in ("template_error", "output_too_large"), (text, run)
        assert watch.seconds < 3.0, text
    assert 0 < accepted < len(texts)
