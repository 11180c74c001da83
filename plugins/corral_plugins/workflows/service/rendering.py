"""Evaluates the expressions of a run: builds the data that they refer to, and renders step configurations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import UNSET

from corral.database.engine import Work
from corral_core.expressions.api import Expressions
from corral_plugins.workflows.service.graph import Graph, Step
from corral_plugins.workflows.service.run_state import RunState, StepRow, read_values, row_key

Json = dict[str, Any]
RAW: Mapping[str, frozenset[str]] = {
    "condition": frozenset({"expression", "if_true", "if_false"}),
    "switch": frozenset({"default"}),
    "loop": frozenset({"while", "body", "max_iterations", "concurrency", "on_item_error"}),
    "parallel": frozenset({"branches", "join"}),
}
"""The configuration fields that are not rendered, because they contain bare expressions, names or other steps."""
ROOTS = frozenset({"input", "steps", "run", "context"})
LOOP_ROOTS = frozenset({"item", "index"})


class Rendering:
    """Evaluates expressions for one run. The inputs and outputs of steps are read when they are first needed.

    This class opens the units of work in which they are read.
    """

    def __init__(self, expressions: Expressions, work: Work, state: RunState, graph: Graph) -> None:
        self._expressions, self._work, self._state, self._graph = expressions, work, state, graph

    async def render(self, step: Step, iteration: tuple[int, ...], secrets: Mapping[str, str] | None = None) -> Json:
        """Return the configuration of a step with all expressions evaluated.

        Without `secrets`, references to secrets are left unchanged. Raise `TemplateError` if an evaluation fails.
        """
        raw = RAW.get(step.type, frozenset())
        given = {key: value for key, value in step.config.items() if key not in raw}
        data = await self._data(self._expressions.references(given), iteration, step.loop)
        rendered = await self._expressions.render(given, data, secrets=secrets)
        return {key: step.config[key] if key in raw else rendered[key] for key in step.config}

    async def output(self, value: Any) -> Any:
        """Evaluate all expressions in a JSON value, and return the result as the output of the run."""
        data = await self._data(self._expressions.references(value), (), None)
        return await self._expressions.render(value, data)

    def secret_names(self, step: Step) -> set[str]:
        """Return the names of the secrets that the configuration of a step refers to."""
        return self._expressions.secret_names(step.config)

    async def boolean(self, expression: str, step: Step, iteration: tuple[int, ...]) -> bool:
        """Evaluate a step's expression, which must return a boolean."""
        data = await self._data(self._expressions.expression_references(expression), iteration, step.loop)
        return bool(await self._expressions.evaluate(expression, data, boolean=True))

    async def loop_continues(self, loop: Step, iteration: tuple[int, ...], done: int) -> bool:
        """Evaluate the condition of a loop after `done` iterations.

        The condition may refer to the steps of the last iteration.
        """
        expression = loop.config["while"]
        data = await self._data(self._expressions.expression_references(expression), (*iteration, done - 1), None)
        data |= {**await self._loop_data(iteration, loop.loop), "index": done}
        return bool(await self._expressions.evaluate(expression, data, boolean=True))

    async def _data(self, names: Iterable[str], iteration: tuple[int, ...], loop: str | None) -> Json:
        """Return the data that expressions can use, including the named steps and the innermost loop's current item."""
        rows = {name: self._row(name, iteration) for name in names if name in self._graph.steps}
        await self.load(row for row in rows.values() if row is not None)
        steps = {name: _step_data(row) for name, row in rows.items()}
        found = {"input": self._state.run.input, "context": self._state.run.context, "steps": steps}
        return {**found, "run": _run_data(self._state), **await self._loop_data(iteration, loop)}

    def _row(self, name: str, iteration: tuple[int, ...]) -> StepRow | None:
        return self._state.row(self._graph.steps[name], iteration)

    async def _loop_data(self, iteration: tuple[int, ...], loop: str | None) -> Json:
        """Return the current item of the innermost loop, and the item's index."""
        if loop is None:
            return {}
        index = iteration[-1]
        items = await self.items(self._state.rows[row_key(loop, iteration[:-1])])
        return {"index": index, "item": items[index] if items is not None else None}

    async def load(self, rows: Iterable[StepRow]) -> None:
        """Read the inputs and outputs of the rows that have not been read yet."""
        missing = {row.id: row for row in rows if row.output is UNSET and not row.is_new}
        if missing:
            values = await self._work(lambda: read_values(list(missing)), read=True)
            for row_id, row in missing.items():
                given, output = values[row_id]
                row.input = given if row.input is UNSET else row.input
                row.output = output if row.output is UNSET else row.output

    async def items(self, row: StepRow) -> list[Any] | None:
        """Return the items of a loop, or None if the loop has a condition instead."""
        if row.input is UNSET:
            await self.load([row])
        found = row.input.get("items") if isinstance(row.input, dict) else None
        return found if isinstance(found, list) else None


def _run_data(state: RunState) -> Json:
    run = state.run
    workflow = {"id": run.workflow_id, "version": run.n}
    told = {"id": run.id, "number": run.number, "started_at": run.started_at, "started_by": run.started_by}
    return {**told, "workflow": workflow}


def _step_data(row: StepRow | None) -> Json:
    if row is None:
        return {"output": None, "status": "pending", "error": None}
    return {"output": None if row.output is UNSET else row.output, "status": row.status, "error": row.error}
