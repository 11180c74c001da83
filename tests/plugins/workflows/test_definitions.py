"""Definitions whose steps do not have the form that the graph reads are refused, with a pointer to the fault."""

from __future__ import annotations

from typing import Any

import pytest
from tests.plugins.workflows.conftest import World, step

pytestmark = pytest.mark.one_engine
COMPUTED = "{{ input.x }}"


@pytest.mark.parametrize(
    ("step_type", "config", "pointer"),
    [
        *(("loop", {"items": [1], "body": body}, "/body") for body in ("abc", 5, {"a": 1}, COMPUTED)),
        *(("parallel", {"branches": each}, "/branches") for each in ("abc", 5, {"a": 1}, COMPUTED)),
        *(("parallel", {"branches": [each]}, "/branches/0") for each in ("abc", 5, COMPUTED)),
        ("parallel", {"branches": [{"name": "a", "steps": COMPUTED}]}, "/branches/0/steps"),
        ("switch", {"value": 1, "cases": COMPUTED}, "/cases"),
        ("switch", {"value": 1, "cases": [COMPUTED]}, "/cases/0"),
        ("switch", {"value": 1, "cases": [{"equals": 1, "steps": COMPUTED}]}, "/cases/0/steps"),
    ],
)
async def test_steps_inside_steps_are_lists_of_steps(world: World, step_type: str, config: Any, pointer: str) -> None:
    answer = await world.member.post("/workflows", {"name": "odd", "steps": [step("odd", step_type, config)]})
    assert answer.status == 422, answer
    assert f"/steps/0/config{pointer}" in [each["pointer"] for each in answer.json()["errors"]]


async def test_an_error_in_a_step_inside_a_step_names_its_fields(world: World) -> None:
    for inner, detail in (
        ({"name": "work"}, "step_type: this field is required"),
        (5, "must be an object"),
        ({"name": "work", "step_type": "agent", "on_error": "retry"}, "on_error: fail, continue, pause, or goto: and"),
    ):
        steps = [step("odd", "loop", {"items": [1], "body": [inner]})]
        (fault,) = (await world.member.post("/workflows", {"name": "odd", "steps": steps})).json()["errors"]
        assert (fault["pointer"], fault["code"]) == ("/config/body/0", "wrong_type")
        assert fault["detail"].startswith(detail)


@pytest.mark.parametrize("depth", [6, 7, 9])
async def test_steps_that_are_nested_too_deep(world: World, depth: int) -> None:
    inner: Any = {"name": "work", "step_type": "agent"}
    for n in range(depth):
        inner = step(f"each_{n}", "loop", {"items": [1], "body": [inner]})
    answer = await world.member.post("/workflows", {"name": "deep", "steps": [inner]})
    assert (answer.status, answer.json()["detail"]) == (422, "Steps can be nested at most 5 levels deep.")


async def test_a_computed_event_is_not_read_as_an_object(world: World) -> None:
    wait = step("odd", "wait", {"event": "{{ input.filter }}"})
    assert (await world.member.post("/workflows", {"name": "odd", "steps": [wait]})).status == 201
