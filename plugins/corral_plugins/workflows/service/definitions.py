"""Reads and writes the rows of workflows and their versions, which contain the definitions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.database.unit import locked
from corral.errors import Conflict, FieldError, Invalid, NotFound
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.http.page import Order, Page, newest_first, paginate
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Settings
from corral_plugins.agents.api import Agents
from corral_plugins.workflows.api import WorkflowCreated, WorkflowDeleted, WorkflowUpdated
from corral_plugins.workflows.models import LIVING, Run, Workflow, WorkflowVersion, fetch_tuples
from corral_plugins.workflows.service.engine import ACTIVE
from corral_plugins.workflows.service.step_conversion import step_view
from corral_plugins.workflows.service.validation import all_steps
from corral_plugins.workflows.service.wakeups import wake
from corral_plugins.workflows.settings import MAX_STEPS
from corral_plugins.workflows.shapes import (
    CloneWorkflow,
    LastRun,
    Status,
    StepView,
    VersionQuery,
    WorkflowItem,
    WorkflowQuery,
    WorkflowVersionItem,
    WorkflowVersionView,
    WorkflowView,
)

Json = dict[str, Any]
SHOWN_RUNS, CANCEL_BATCH = 100, 200
CANCEL_JOB = "workflows.cancel_runs"


def find_readable_workflow(workflow_id: str, caller: Principal) -> Workflow:
    """Return a workflow that is not deleted and that the caller may read. Otherwise, raise `NotFound`."""
    row: Workflow | None = Workflow.get_or_none((Workflow.id == workflow_id) & LIVING & visible(Workflow, caller))
    if row is None:
        raise NotFound("There is no workflow with this id.")
    return row


def find_writable_workflow(workflow_id: str, caller: Principal) -> Workflow:
    """Return a workflow if the caller may change it. Otherwise, raise `NotFound` or `Forbidden`."""
    row = find_readable_workflow(workflow_id, caller)
    require_owner(caller, row.created_by, what="workflow", manage="workflows.manage")
    return row


class WorkflowStore:
    """Reads and writes workflows. Every method runs in the caller's unit of work."""

    def __init__(self, settings: Settings, agents: Agents) -> None:
        self._settings, self._agents = settings, agents

    # -- reading

    def get(self, workflow_id: str, *, by: Principal) -> WorkflowView:
        """Return a workflow with its steps. Raise `NotFound` if the caller may not read it."""
        return view_of(find_readable_workflow(workflow_id, by))

    def list(self, query: WorkflowQuery, *, by: Principal) -> Page[WorkflowItem]:
        """Return a page of the workflows that match every filter, newest first."""
        rows = Workflow.select().where(LIVING & visible(Workflow, by), *_filters(query))
        page = paginate(rows, query, by, scope="workflows", order=newest_first(Workflow), make=_identity)
        last = _last_runs([row.last_run_id for row in page.items if row.last_run_id is not None])
        items = [WorkflowItem(**_item_fields(row, last.get(row.last_run_id))) for row in page.items]
        return Page(items=items, total=page.total, limit=page.limit, offset=page.offset, next=page.next)

    def versions(self, workflow_id: str, query: VersionQuery, *, by: Principal) -> Page[WorkflowVersionItem]:
        """Return a page of the versions of a workflow, newest first."""
        find_readable_workflow(workflow_id, by)
        rows = WorkflowVersion.select().where(WorkflowVersion.workflow_id == workflow_id)
        scope = f"workflow_versions:{workflow_id}"
        return paginate(rows, query, by, scope=scope, order=(Order(WorkflowVersion.n),), make=_version_item)

    def version(self, workflow_id: str, n: int, *, by: Principal) -> WorkflowVersionView:
        """Return one version of a workflow. Raise `NotFound` if the version does not exist."""
        find_readable_workflow(workflow_id, by)
        row = find_version(workflow_id, n)
        item = msgspec.structs.asdict(_version_item(row))
        return WorkflowVersionView(**item, config=row.config, steps=[step_view(step) for step in row.steps])

    # -- writing

    def insert(self, values: Json, *, by: Principal) -> WorkflowView:
        """Create a workflow with the given column values."""
        self._check_references(values)
        now = clock.now()
        row = Workflow(**values, id=new_id(), created_by=by.user_id, created_at=now, updated_at=now)
        row.step_count = len(row.steps)
        Workflow.insert(row.__data__).execute()
        add_version(row, by)
        emit(WorkflowCreated(workflow_id=row.id, name=row.name), object=("workflow", row.id), owner=row.created_by)
        return view_of(row)

    def update(self, before: Workflow, changes: Json, *, by: Principal) -> WorkflowView | None:
        """Change a workflow. Return None if the workflow was changed by another request after it was read.

        A change to the configuration or the steps creates a new version.
        """
        row = find_writable_workflow(before.id, by)
        changes = {name: value for name, value in changes.items() if getattr(row, name) != value}
        if row.version != before.version:
            return None
        if not changes:
            return view_of(row)
        self._check_references(changes)
        is_redefined = bool(changes.keys() & {"config", "steps"})
        changes |= {"version": row.version + 1, "n": row.n + is_redefined, "updated_at": clock.now()}
        changes["step_count"] = len(changes.get("steps", row.steps))
        if not Workflow.update(changes).where((Workflow.id == row.id) & (Workflow.version == row.version)).execute():
            return None
        for name, value in changes.items():
            setattr(row, name, value)
        if is_redefined:
            add_version(row, by)
        event = WorkflowUpdated(workflow_id=row.id, name=row.name, workflow_version=row.n)
        emit(event, object=("workflow", row.id), owner=row.created_by)
        return view_of(row)

    def clone(self, workflow_id: str, body: CloneWorkflow, *, by: Principal) -> WorkflowView:
        """Copy a workflow. The caller owns the copy, and the steps of the copy have new ids."""
        source = find_readable_workflow(workflow_id, by)
        steps = [{**step, "id": new_id()} for step in source.steps]
        kept = {name: getattr(source, name) for name in ("description", "config", "tags")}
        values = {**kept, "steps": steps, "name": body.name, "is_template": body.is_template, "status": "active"}
        return self.insert(values, by=by)

    def delete(self, workflow_id: str, match: IfMatch, *, force: bool, by: Principal) -> int:
        """Delete a workflow and cancel its active runs. Return the number of runs to cancel.

        A background job cancels the runs that do not fit into the first batch. Raise `Conflict` with the code `in_use`
        if there are active runs and `force` is not set.
        """
        locked(Workflow.select(Workflow.id).where(Workflow.id == workflow_id)).first()  # keeps the version as it is
        row = find_writable_workflow(workflow_id, by)
        match.check(row.version)
        active = [found[0] for found in fetch_tuples(_active_runs(row.id).limit(SHOWN_RUNS))]
        if active and not force:
            detail = "Runs of this workflow are active; cancel them, or delete the workflow with force=true."
            raise Conflict(detail, code="in_use", references=active)
        affected = int(_active_runs(row.id).count()) if active else 0
        gone = {"deleted_at": clock.now(), "version": row.version + 1}
        if not Workflow.update(gone).where((Workflow.id == row.id) & LIVING).execute():
            raise NotFound("There is no workflow with this id.")
        if active and cancel_runs_of_deleted(row.id) == CANCEL_BATCH:
            enqueue(CANCEL_JOB, workflow_id=row.id)
        emit(WorkflowDeleted(workflow_id=row.id, name=row.name), object=("workflow", row.id), owner=row.created_by)
        return affected

    def _check_references(self, values: Json) -> None:
        """Raise `Invalid` if there are too many steps, or if a step names an agent that does not exist."""
        steps = [*all_steps(values.get("steps", ()))]
        most = self._settings.get(MAX_STEPS)
        if len(steps) > most:
            raise Invalid.at("/steps", "too_long", f"A workflow has at most {most} steps (workflows.max_steps).")
        named = {step["agent_id"] for _, step in steps if step["agent_id"] is not None}
        found = self._agents.find_many(sorted(named)) if named else {}
        faults = [
            FieldError(f"{pointer}/agent_id", "unknown_reference", "There is no agent with this id.")
            for pointer, step in steps
            if step["agent_id"] is not None and step["agent_id"] not in found
        ]
        if faults:
            raise Invalid(faults[0].detail, code="unknown_reference", errors=faults)


def cancel_runs_of_deleted(workflow_id: str) -> int:
    """Cancel one batch of the active runs of a deleted workflow. Return the number of runs in the batch."""
    stop = {"kind": "cancel", "type": "cancelled", "message": "The workflow was deleted."}
    found = [row[0] for row in fetch_tuples(_active_runs(workflow_id).where(Run.stop.is_null()).limit(CANCEL_BATCH))]
    Run.update(stop=stop, cancel_requested_at=clock.now()).where(Run.id.in_(found) & Run.stop.is_null()).execute()
    for run_id in found:
        wake(run_id)
    return len(found)


def _active_runs(workflow_id: str) -> Any:
    """Return a query for the ids of a workflow's unfinished runs, oldest first."""
    is_active = (Run.workflow_id == workflow_id) & Run.status.in_(("queued", *ACTIVE))
    return Run.select(Run.id).where(is_active).order_by(Run.id)


def find_version(workflow_id: str, n: int) -> WorkflowVersion:
    """Return a version of a workflow. Raise `NotFound` if the version does not exist."""
    same = (WorkflowVersion.workflow_id == workflow_id) & (WorkflowVersion.n == n)
    row: WorkflowVersion | None = WorkflowVersion.get_or_none(same)
    if row is None:
        raise NotFound(f"The workflow has no version {n}.")
    return row


def add_version(row: Workflow, by: Principal) -> None:
    """Store the definition of a workflow as a new version, numbered `row.n`."""
    WorkflowVersion.insert(
        id=new_id(),
        workflow_id=row.id,
        n=row.n,
        name=row.name,
        config=row.config,
        steps=row.steps,
        created_by=by.user_id,
        created_at=clock.now(),
    ).execute()


def view_of(row: Workflow) -> WorkflowView:
    """Return the API representation of a workflow."""
    last = _last_runs([row.last_run_id]).get(row.last_run_id) if row.last_run_id is not None else None
    return WorkflowView(**_item_fields(row, last), steps=step_views(row.steps))


def step_views(steps: Sequence[Json]) -> list[StepView]:
    """Return the API representations of stored steps, in order."""
    return [step_view(step) for step in steps]


def _item_fields(row: Workflow, last: LastRun | None) -> Json:
    same = ("id", "version", "created_by", "created_at", "updated_at", "name", "description", "is_template", "config")
    fields = {name: getattr(row, name) for name in (*same, "tags", "step_count")}
    return {**fields, "workflow_version": row.n, "status": cast(Status, row.status), "last_run": last}


def _last_runs(ids: Sequence[str]) -> dict[str, LastRun]:
    if not ids:
        return {}
    found = fetch_tuples(Run.select(Run.id, Run.status, Run.created_at, Run.finished_at).where(Run.id.in_(list(ids))))
    return {row[0]: LastRun(id=row[0], status=row[1], created_at=row[2], finished_at=row[3]) for row in found}


def _version_item(row: WorkflowVersion) -> WorkflowVersionItem:
    return WorkflowVersionItem(n=row.n, name=row.name, step_count=len(row.steps), by=row.created_by, at=row.created_at)


def _identity(row: Workflow) -> Workflow:
    return row


def _filters(query: WorkflowQuery) -> list[Any]:
    found: list[Any] = []
    if query.status is not UNSET:
        found.append(Workflow.status.in_(query.status))
    if query.is_template is not UNSET:
        found.append(Workflow.is_template == query.is_template)
    if query.search is not UNSET:
        found.append(Workflow.name.contains(query.search) | Workflow.description.contains(query.search))
    if query.tag is not UNSET and query.tag:
        found.append(functools.reduce(operator.or_, [_has_tag(tag) for tag in query.tag]))
    return found


def _has_tag(tag: str) -> Any:
    """Return the SQL condition for workflows with exactly this tag. The condition works on SQLite and PostgreSQL."""
    quoted = peewee.Value(msgspec.json.encode(tag).decode(), converter=False)
    return peewee.fn.REPLACE(Workflow.tags, quoted, "") != Workflow.tags
