"""How runs advance: order, branches, loops, failures."""

from __future__ import annotations

import pytest
from tests.plugins.workflows.conftest import World, statuses, step, steps_of, transform

from corral.database.unit import current
from corral_plugins.workflows.service.event_waits import _read


@pytest.mark.one_engine
async def test_a_run_computes_its_output(world: World) -> None:
    run = await world.run(
        transform("one", "{{ input.n }}"),
        transform("two", "n={{ steps.one.output }}"),
        input={"n": 5},
    )
    assert run["status"] == "completed", run
    assert run["output"] == {"two": "n=5"}
    assert steps_of(run)["one"]["output"] == 5


@pytest.mark.one_engine
async def test_a_condition_takes_one_path_and_a_join_runs_after_it(world: World) -> None:
    run = await world.run(
        step("decide", "condition", {"expression": "input.n > 3", "if_true": ["big"], "if_false": ["small"]}),
        transform("big", "big", order=2),
        transform("small", "small", order=2),
        transform("join", "{{ steps.big.output }}{{ steps.small.output }}", order=3),
        input={"n": 5},
    )
    assert run["status"] == "completed", run
    assert statuses(run, "big", "small", "join") == ["completed", "skipped", "completed"]
    assert steps_of(run)["small"]["reason"] == "branch_not_taken"
    assert run["output"] == {"join": "big"}


async def test_a_loop_and_parallel_branches(world: World) -> None:
    run = await world.run(
        step("each", "loop", {"items": "{{ input.items }}", "body": [transform("double", "{{ item * 2 }}")]}),
        step(
            "both",
            "parallel",
            {
                "branches": [
                    {"name": "a", "steps": [transform("a1", 1), transform("a2", "{{ steps.a1.output + 1 }}")]},
                    {"name": "b", "steps": [transform("b1", "{{ size(steps.each.output.results) }}")]},
                ]
            },
        ),
        input={"items": [1, 2, 3]},
    )
    assert run["status"] == "completed", run
    assert steps_of(run)["each"]["output"] == {"results": [2, 4, 6], "errors": []}
    assert run["output"] == {"both": {"a": 2, "b": 3}}


@pytest.mark.one_engine
async def test_the_look_for_awaited_events_reads_only_steps_that_wait_for_one(world: World) -> None:
    def plan() -> list[str]:
        connection, statements = current().connection, list[str]()
        connection.set_trace_callback(statements.append)
        assert _read(("", ""))[0] == []
        connection.set_trace_callback(None)
        return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statements[-1]}")]

    (detail,) = await world.kit.work(plan)
    assert "workflows_step_runs_events" in detail
