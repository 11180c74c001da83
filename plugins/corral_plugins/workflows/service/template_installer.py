"""Installs workflows from marketplace templates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral.auth.principal import Principal
from corral.database.unit import locked
from corral.errors import Conflict
from corral.http.answers import ANY_VERSION
from corral.schema.conversion import convert
from corral_plugins.marketplace.api import InstalledObject, Installer, ObjectUse, functions_of
from corral_plugins.workflows.models import LIVING, Run, Workflow, fetch_tuples
from corral_plugins.workflows.service.definitions import WorkflowStore, find_readable_workflow, find_writable_workflow
from corral_plugins.workflows.service.run_state import FINAL_RUN
from corral_plugins.workflows.service.step_conversion import DEFAULTS as STEP_DEFAULTS
from corral_plugins.workflows.service.step_conversion import stored_config, stored_steps
from corral_plugins.workflows.service.validation import DefinitionValidator
from corral_plugins.workflows.shapes import NewStep, NewWorkflow, WorkflowConfig

Json = dict[str, Any]
COPIED = ("name", "description", "tags")


class WorkflowTemplateInstaller:
    """The installer for objects of the kind `workflow`. Its services are set after the kernel has booted."""

    store: WorkflowStore | None
    definitions: DefinitionValidator | None

    def definition(self) -> Installer:
        """Return the definition of this installer."""
        return Installer(
            kind="workflow",
            title="Workflow",
            schema=_schema(),
            write="workflows.write",
            read="workflows.read",
            **functions_of(self),
            name_length=200,
        )

    def check_spec(self, spec: Json) -> None:
        """Raise `Invalid` if the workflow definition in a template is invalid."""
        assert self.definitions is not None
        new = convert(NewWorkflow, spec)
        self.definitions.check(stored_steps(new.steps), stored_config(new.config))

    def find_existing(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the ids of the workflows with these names, keyed by name."""
        rows = fetch_tuples(Workflow.select(Workflow.name, Workflow.id).where(LIVING & Workflow.name.in_(list(names))))
        return dict(rows)

    def install(self, spec: Json, by: Principal) -> InstalledObject:
        """Create a workflow as a draft, which can be run only manually."""
        new = convert(NewWorkflow, spec)
        values = {name: getattr(new, name) for name in COPIED}
        values |= {"is_template": False, "status": "draft"}
        values |= {"config": stored_config(new.config), "steps": stored_steps(new.steps)}
        return InstalledObject(id=self._store().insert(values, by=by).id)

    def read_fields(self, ids: Sequence[str]) -> Mapping[str, Json]:
        """Return the definitions, keyed by workflow id.

        The configuration and the steps form one value because they refer to each other.
        """
        return {row.id: _comparable_fields(row) for row in Workflow.select().where(LIVING & Workflow.id.in_(list(ids)))}

    def lock(self, ids: Sequence[str]) -> None:
        """Lock the workflows until the unit of work ends."""
        list(locked(Workflow.select(Workflow.id).where(Workflow.id.in_(list(ids))).order_by(Workflow.id)))

    def update(self, workflow_id: str, fields: Json, by: Principal) -> None:
        """Change a workflow. The caller must have checked the new definition.

        Raise `Conflict` if the workflow was changed concurrently.
        """
        changes = {name: value for name, value in fields.items() if name in COPIED}
        if "config" in fields:
            changes["config"] = stored_config(convert(WorkflowConfig, fields["config"] or {}))
        if "steps" in fields:
            changes["steps"] = stored_steps(convert(list[NewStep], fields["steps"] or []))
        row = find_writable_workflow(workflow_id, by)
        if self._store().update(row, changes, by=by) is None:
            raise Conflict(
                "The workflow was changed by another request at the same time; repeat the request.",
                current_status=row.status,
            )

    def find_uses(self, ids: Sequence[str]) -> Sequence[ObjectUse]:
        """Return the workflows whose steps or review policies name agents or workflows with these ids."""
        columns = (Workflow.steps, Workflow.config)
        names = functools.reduce(operator.or_, [_text_contains(column, each) for column in columns for each in ids])
        return [
            ObjectUse(id=row.id, name=row.name, uses=each)
            for row in Workflow.select(Workflow.id, Workflow.name, *columns).where(LIVING & names)
            for text in (msgspec.json.encode([row.steps, row.config]).decode(),)
            for each in ids
            if each in text
        ]

    def find_running(self, ids: Sequence[str]) -> Sequence[str]:
        """Return the ids of the given workflows that have unfinished runs."""
        active = Run.workflow_id.in_(list(ids)) & Run.status.not_in(FINAL_RUN)
        return [row[0] for row in fetch_tuples(Run.select(Run.workflow_id).where(active).distinct())]

    def remove(self, workflow_id: str, by: Principal) -> None:
        """Delete a workflow."""
        self._store().delete(workflow_id, ANY_VERSION, force=False, by=by)

    def export(self, workflow_id: str, by: Principal) -> Json:
        """Return the definition of a workflow."""
        row = find_readable_workflow(workflow_id, by)
        return {name: value for name, value in _values(row).items() if name == "name" or value}

    def _store(self) -> WorkflowStore:
        assert self.store is not None
        return self.store


def _text_contains(column: Any, text: str) -> Any:
    """Return the SQL condition for rows in which the JSON text of a column contains `text`."""
    return peewee.Expression(column, peewee.OP.ILIKE, peewee.Value(f"%{text}%", converter=False))


def _comparable_fields(row: Workflow) -> Json:
    values = _values(row)
    definition = {"config": values["config"], "steps": values["steps"]}
    return {**values, "config": definition, "steps": definition}


def _values(row: Workflow) -> Json:
    values = {name: getattr(row, name) for name in COPIED}
    return {**values, "config": row.config, "steps": [_step_values(step) for step in row.steps]}


def _step_values(step: Json) -> Json:
    """Return a stored step in the form of a request, without its id and without defaults."""
    kept = {name: value for name, value in step.items() if name != "id" and STEP_DEFAULTS.get(name, "") != value}
    config = dict(step["config"])
    if isinstance(config.get("body"), list):
        config["body"] = [_step_values(each) for each in config["body"]]
    if isinstance(config.get("branches"), list):
        config["branches"] = [
            {**branch, "steps": [_step_values(each) for each in branch["steps"]]} for branch in config["branches"]
        ]
    return {**kept, **({"config": config} if config else {})}


@functools.cache
def _schema() -> Json:
    """Return the schema of a new workflow without `is_template` and `status`, which a template cannot set."""
    schema = msgspec.json.schema(NewWorkflow)
    fields: Json = schema["$defs"]["NewWorkflow"]["properties"]
    del fields["is_template"], fields["status"]
    return schema
