"""Tells what a run of a workflow would do, without running anything."""

from __future__ import annotations

import asyncio
from typing import Any

import peewee

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Invalid
from corral.schema.json_schema_validation import json_schema_errors
from corral_core.expressions.api import Expressions
from corral_plugins.agents.api import Agents
from corral_plugins.secrets.api import Secrets
from corral_plugins.workflows.models import Run, Workflow
from corral_plugins.workflows.service.definitions import find_readable_workflow
from corral_plugins.workflows.service.validation import Definitions, all_steps, plan_of
from corral_plugins.workflows.shapes import DryRun, Missing

Json = dict[str, Any]
NEWEST = 20


class DryRuns:
    """Plans runs."""

    secrets: Secrets | None

    def __init__(self, work: Work, definitions: Definitions, expressions: Expressions, agents: Agents) -> None:
        self._work, self._definitions, self._expressions, self._agents = work, definitions, expressions, agents

    async def plan(self, workflow_id: str, input: Any, *, by: Principal) -> DryRun:
        """Return the plan of a run with this input. Raise `Invalid` if the definition or the input is not valid."""
        row = await self._work(lambda: find_readable_workflow(workflow_id, by), read=True)
        schema = row.config.get("input_schema")
        if schema is not None and (faults := json_schema_errors(schema, input, pointer_prefix="/input")):
            raise Invalid("The input does not match the input schema.", code="schema_mismatch", errors=faults)
        graph = await asyncio.to_thread(self._definitions.check, row.steps, row.config)
        names = sorted(self._expressions.secret_names(row.steps))
        missing, cost = await self._work(lambda: self._missing(row, names), read=True)
        return DryRun(plan=plan_of(graph), missing=missing, estimated_cost_usd=cost)

    def _missing(self, row: Workflow, names: list[str]) -> tuple[Missing, float | None]:
        agents = {step["agent_id"] for _, step in all_steps(row.steps) if step["agent_id"] is not None}
        found = self._agents.find_many(sorted(agents)) if agents else {}
        missing = Missing(secrets=names if self.secrets is None else [], tools=[], agents=sorted(agents - found.keys()))
        return missing, _average_cost(row.id)


def _average_cost(workflow_id: str) -> float | None:
    completed = (Run.workflow_id == workflow_id) & (Run.status == "completed")
    newest = Run.select(Run.cost_micro).where(completed).order_by(Run.id.desc()).limit(NEWEST).alias("newest")
    row = peewee.Select([newest], [peewee.fn.AVG(newest.c.cost_micro)]).tuples().execute(Run._meta.database)
    average = next(iter(row))[0]
    return None if average is None else float(average) / 1e6
