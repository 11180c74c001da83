"""Creates and changes workflows, and checks their definitions.

Because parsing the expressions of a definition takes time, a definition is checked in a thread, between the unit of
work that reads it and the unit of work that writes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET

from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, NotFound, Unavailable
from corral.http.answers import ANY_VERSION, IfMatch
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.workflows.models import Workflow
from corral_plugins.workflows.service.definitions import (
    WorkflowStore,
    find_readable_workflow,
    find_version,
    find_writable_workflow,
)
from corral_plugins.workflows.service.graph import branch_targets, build_graph
from corral_plugins.workflows.service.missing_references import ReferenceChecker
from corral_plugins.workflows.service.step_conversion import (
    patched_step,
    resolve_references,
    stored_config,
    stored_step,
    stored_steps,
)
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.service.validation import (
    DefinitionValidator,
    definition_warnings,
    planned_steps,
    with_step_names,
)
from corral_plugins.workflows.shapes import (
    NewStep,
    NewWorkflow,
    StepPatch,
    StepView,
    ValidateWorkflow,
    Validation,
    WorkflowPatch,
    WorkflowView,
)

Json = dict[str, Any]
TRIES = 5


class WorkflowManagement:
    """Changes workflows. The methods open their own units of work, with the context `entry`."""

    def __init__(
        self,
        work: Work,
        store: WorkflowStore,
        definitions: DefinitionValidator,
        types: StepTypes,
        references: ReferenceChecker,
    ) -> None:
        self._work, self._store, self._definitions, self._types = work, store, definitions, types
        self._references = references

    async def create(self, new: NewWorkflow, *, by: Principal, entry: UnitContext) -> WorkflowView:
        """Create a workflow. Raise `Invalid` if its definition is invalid."""
        values = {name: getattr(new, name) for name in ("name", "description", "is_template", "status", "tags")}
        values |= {"config": stored_config(new.config), "steps": stored_steps(new.steps)}
        await self._check(values["steps"], values["config"])
        return await self._work(lambda: self._store.insert(values, by=by), entry=entry)

    async def update(
        self, workflow_id: str, patch: WorkflowPatch, match: IfMatch, *, by: Principal, entry: UnitContext
    ) -> WorkflowView:
        """Change a workflow. Active runs keep the definition that they started with."""
        simple = ("name", "description", "is_template", "status", "tags")
        changes = {name: getattr(patch, name) for name in simple if getattr(patch, name) is not UNSET}
        if patch.config is not UNSET:
            changes["config"] = stored_config(patch.config)
        if patch.steps is not UNSET:
            changes["steps"] = stored_steps(patch.steps)
        return await self._change(workflow_id, lambda row: changes, match, by=by, entry=entry)

    async def roll_back(
        self, workflow_id: str, n: int, match: IfMatch, *, by: Principal, entry: UnitContext
    ) -> WorkflowView:
        """Create a new version with the content of version `n`. Raise `Conflict` if the content would not change."""
        earlier = await self._work(lambda: self._version(workflow_id, n, by), entry=entry, read=True)

        def changes(row: Workflow) -> Json:
            found = {"config": earlier["config"], "steps": earlier["steps"]}
            if found == {"config": row.config, "steps": row.steps}:
                detail = f"Version {n} is already the current definition; there is nothing to roll back."
                raise Conflict(detail, current_status=row.status)
            return found

        return await self._change(workflow_id, changes, match, by=by, entry=entry)

    async def add_step(self, workflow_id: str, new: NewStep, *, by: Principal, entry: UnitContext) -> StepView:
        """Add a step. Raise `Conflict` with the code `duplicate` if a step with this name already exists."""
        added: Json = {}

        def changes(row: Workflow) -> Json:
            step = stored_step(new, row.steps)
            _refuse_duplicate(step, row.steps)
            steps = resolve_references([*row.steps, step])
            added["name"] = step["name"]
            return {"steps": sorted(steps, key=lambda each: each["order"])}

        view = await self._change(workflow_id, changes, ANY_VERSION, by=by, entry=entry)
        return next(step for step in view.steps if step.name == added["name"])

    async def update_step(
        self, workflow_id: str, step_id: str, patch: StepPatch, match: IfMatch, *, by: Principal, entry: UnitContext
    ) -> StepView:
        """Change a step."""

        def changes(row: Workflow) -> Json:
            before = _find_step(row, step_id)
            step, others = patched_step(before, patch), [each for each in row.steps if each["id"] != step_id]
            _refuse_duplicate(step, others)
            if step["name"] != before["name"]:
                self._refuse_referenced(row, before["name"])
            steps = [step if each["id"] == step_id else each for each in row.steps]
            return {"steps": sorted(resolve_references(steps), key=lambda each: each["order"])}

        view = await self._change(workflow_id, changes, match, by=by, entry=entry)
        return next(step for step in view.steps if step.id == step_id)

    async def delete_step(
        self, workflow_id: str, step_id: str, match: IfMatch, *, by: Principal, entry: UnitContext
    ) -> None:
        """Delete a step. Raise `Conflict` with the code `in_use` if other steps refer to it."""

        def changes(row: Workflow) -> Json:
            self._refuse_referenced(row, _find_step(row, step_id)["name"])
            return {"steps": [each for each in row.steps if each["id"] != step_id]}

        await self._change(workflow_id, changes, match, by=by, entry=entry)

    async def validate(self, workflow_id: str, body: ValidateWorkflow, *, by: Principal) -> Validation:
        """Check a workflow. If an input is given, also check whether the workflow accepts the input."""
        row = await self._work(lambda: find_readable_workflow(workflow_id, by), read=True)
        faults, graph = await asyncio.to_thread(self._definitions.faults, row.steps, row.config)
        schema = row.config.get("input_schema")
        if body.input is not UNSET and schema is not None:
            faults = [*faults, *json_schema_errors(schema, body.input, pointer_prefix="/input")]
        used = self._references.find_references(row.steps) if graph is not None else []
        obstacles = await self._work(lambda: self._references.find_obstacles(used), read=True)
        return Validation(
            valid=not faults,
            errors=with_step_names(faults, row.steps),
            warnings=with_step_names(
                [*definition_warnings(row.steps), *(each.warning for each in obstacles)], row.steps
            ),
            plan=planned_steps(graph) if graph is not None else [],
        )

    # -- parts

    async def _check(self, steps: list[Json], config: Json) -> None:
        await asyncio.to_thread(self._definitions.check, steps, config)

    async def _change(
        self,
        workflow_id: str,
        changes: Callable[[Workflow], Json],
        match: IfMatch,
        *,
        by: Principal,
        entry: UnitContext,
    ) -> WorkflowView:
        """Check and write the changes that the function `changes` derives from the current workflow."""
        for _ in range(TRIES):
            row = await self._work(lambda: find_writable_workflow(workflow_id, by), entry=entry, read=True)
            match.check(row.version)
            wanted = changes(row)
            if wanted.keys() & {"config", "steps"}:
                await self._check(wanted.get("steps", row.steps), wanted.get("config", row.config))
            view = await self._write(row, wanted, by, entry)
            if view is not None:
                return view
        raise Unavailable(
            "The workflow was changed by another request at the same time; repeat the request.", code="overloaded"
        )

    async def _write(self, row: Workflow, wanted: Json, by: Principal, entry: UnitContext) -> WorkflowView | None:
        return await self._work(lambda: self._store.update(row, wanted, by=by), entry=entry)

    def _version(self, workflow_id: str, n: int, by: Principal) -> Json:
        find_writable_workflow(workflow_id, by)
        row = find_version(workflow_id, n)
        return {"config": row.config, "steps": row.steps}

    def _refuse_referenced(self, row: Workflow, name: str) -> None:
        """Raise `Conflict` if another step, or the configuration of the workflow, refers to the step `name`."""
        graph = build_graph(row.steps, row.config, self._types.gotos)
        users = [
            step.name
            for step in graph.steps.values()
            if step.name != name and (_names_step(row, step.name, name) or name in dict(branch_targets(step)).values())
        ]
        if row.config.get("on_failure_step") == name:
            users.append("config.on_failure_step")
        if users:
            detail = f"{', '.join(users[:5])} refer to the step {name}; change them first."
            raise Conflict(detail, code="in_use", references=users[:100])


def _names_step(row: Workflow, user: str, name: str) -> bool:
    """Return whether the step `user` names the step `name`: as a dependency, as a jump target, or in an expression."""
    step = next((each for each in row.steps if each["name"] == user), None)
    if step is None:
        return False
    if name in (step["depends_on"] or ()) or step["on_error"] == f"goto:{name}":
        return True
    text = msgspec.json.encode([step["config"], step["when"]]).decode()
    return f"steps.{name}." in text or f'steps[\\"{name}\\"]' in text or f'"goto:{name}"' in text


def _refuse_duplicate(step: Json, others: list[Json]) -> None:
    for each in others:
        if each["name"] == step["name"]:
            detail = f"The workflow already has a step named {step['name']}."
            raise Conflict(detail, code="duplicate", existing_id=each["id"])


def _find_step(row: Workflow, step_id: str) -> Json:
    found: Json | None = next((each for each in row.steps if each["id"] == step_id), None)
    if found is None:
        raise NotFound("The workflow has no step with this id.")
    return found
