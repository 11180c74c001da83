"""Shows what a run of a workflow would do, without running any step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import peewee

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Invalid
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.workflows.models import Run
from corral_plugins.workflows.service.definitions import find_readable_workflow
from corral_plugins.workflows.service.missing_references import DETAILS, Obstacle, ReferenceChecker
from corral_plugins.workflows.service.validation import DefinitionValidator, planned_steps
from corral_plugins.workflows.shapes import DryRun, Missing

Json = dict[str, Any]
NEWEST = 20


class DryRuns:
    """Plans runs without running any step."""

    def __init__(self, work: Work, definitions: DefinitionValidator, references: ReferenceChecker) -> None:
        self._work, self._definitions, self._references = work, definitions, references

    async def plan(self, workflow_id: str, input: Any, *, by: Principal) -> DryRun:
        """Return the plan of a run with this input. Raise `Invalid` if the definition or the input is invalid."""
        row = await self._work(lambda: find_readable_workflow(workflow_id, by), read=True)
        schema = row.config.get("input_schema")
        if schema is not None and (faults := json_schema_errors(schema, input, pointer_prefix="/input")):
            raise Invalid("The input does not match the input schema.", code="schema_mismatch", errors=faults)
        graph = await asyncio.to_thread(self._definitions.check, row.steps, row.config)
        used = self._references.find_references(row.steps)
        obstacles, cost = await self._work(
            lambda: (self._references.find_obstacles(used), _average_cost(row.id)), read=True
        )
        return DryRun(plan=planned_steps(graph), missing=_missing(obstacles), estimated_cost_usd=cost)


def _missing(obstacles: Sequence[Obstacle]) -> Missing:
    references = [each.reference for each in obstacles]
    names = {kind: sorted({each.name for each in references if each.kind == kind}) for kind in DETAILS}
    return Missing(secrets=names["secret"], tools=names["tool"], agents=names["agent"])


def _average_cost(workflow_id: str) -> float | None:
    completed = (Run.workflow_id == workflow_id) & (Run.status == "completed")
    newest = Run.select(Run.cost_micro).where(completed).order_by(Run.id.desc()).limit(NEWEST).alias("newest")
    row = peewee.Select([newest], [peewee.fn.AVG(newest.c.cost_micro)]).tuples().execute(Run._meta.database)
    average = next(iter(row))[0]
    return None if average is None else float(average) / 1e6
