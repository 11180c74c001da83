"""The rows of one run in memory while the run is being advanced, and the functions that write the changes.

Rows are read without their inputs and outputs, which may be large and are read only when an expression needs them. If
they change in the meantime, the revision of the run changes too, and the computed changes are not written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from corral import clock
from corral.database.statement import Statement
from corral.ids import new_id
from corral_plugins.workflows.models import Run, StepRun
from corral_plugins.workflows.service.graph import Step

FINAL = ("completed", "failed", "skipped", "cancelled")
FINAL_RUN = ("completed", "failed", "cancelled")
Json = dict[str, Any]


class StepRow(msgspec.Struct, kw_only=True):
    """A step of a run. `input` and `output` are `UNSET` until they are read.

    To change columns, call `set`, which records the changes.
    """

    id: str
    key: str
    name: str
    iteration: list[int]
    status: str
    type: str
    created_at: str
    reason: str | None = None
    error: Json | None = None
    report: Json | None = None
    attempt: int = 1
    attempts: list[Json] = []
    goto: str | None = None
    reused: bool = False
    person: bool = False
    waits_for: str | None = None
    event: str | None = None
    cursor: int | None = None
    lease: str | None = None
    lease_until: str | None = None
    wake_at: str | None = None
    cost_micro: int = 0
    started_at: str | None = None
    finished_at: str | None = None
    input: Any | UnsetType = UNSET
    output: Any | UnsetType = UNSET
    is_new: bool = False
    changes: Json = {}

    def set(self, **changes: Any) -> None:
        """Change columns. The database is updated once all changes that advance the run have been computed."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.changes = {**self.changes, **changes}

    @property
    def is_open(self) -> bool:
        """Whether the step has not ended."""
        return self.status not in FINAL

    @property
    def succeeded(self) -> bool:
        """Whether the steps that depend on this step may run.

        This is true if the step is completed, or if the step failed and a person chose to skip it. It is false after a
        jump, because then only the target of the jump runs.
        """
        return (self.status == "completed" and self.goto is None) or (
            self.status == "skipped" and self.reason == "resolved"
        )


LIGHT = tuple(name for name in StepRow.__struct_fields__ if name not in ("input", "output", "is_new", "changes"))
RUN_COLUMNS = tuple(Run._meta.sorted_field_names)
_RUN = Statement(lambda p: Run.select().where(Run.id == p("id")).tuples())
_ROWS = Statement(
    lambda p: (
        StepRun.select(*(getattr(StepRun, name) for name in LIGHT))
        .where(StepRun.run_id == p("run_id"))
        .order_by(StepRun.id)
        .tuples()
    )
)
_INSERT = Statement(lambda p: StepRun.insert({field: p(field.name) for field in StepRun._meta.sorted_fields}))
_CONVERTED: Mapping[str, Any] = {
    name: getattr(StepRun, name).python_value
    for name in ("iteration", "error", "report", "attempts", "reused", "person")
}


class RunState:
    """The state of a run: the run itself, and its steps by key. `changes` contains the changed columns of the run."""

    def __init__(self, run: Run, rows: Iterable[StepRow]) -> None:
        self.run = run
        self.rows = {row.key: row for row in rows}
        self.changes: Json = {}

    def set(self, **changes: Any) -> None:
        """Change columns of the run."""
        for name, value in changes.items():
            setattr(self.run, name, value)
        self.changes |= changes

    def row(self, step: Step, iteration: tuple[int, ...]) -> StepRow | None:
        """Return the row of a step, or None if the step has not been reached.

        If the step is inside loops, `iteration` selects the iterations.
        """
        return self.rows.get(row_key(step.name, iteration[: step.loops]))

    def add(self, step: Step, iteration: tuple[int, ...], status: str) -> StepRow:
        """Add a row for a step that the run has reached."""
        row = StepRow(
            id=new_id(),
            key=row_key(step.name, iteration[: step.loops]),
            name=step.name,
            iteration=list(iteration[: step.loops]),
            status=status,
            type=step.type,
            created_at=clock.now(),
            is_new=True,
        )
        self.rows[row.key] = row
        return row


def row_key(name: str, iteration: Iterable[int]) -> str:
    """Return the key of a step in an iteration, such as `fetch[3]`."""
    return name + "".join(f"[{n}]" for n in iteration)


# -- units of work


def load_state(run_id: str) -> RunState | None:
    """Return the state of a run, or None if the run does not exist. The run is read before its steps."""
    found = _RUN.one({"id": run_id})
    if found is None:
        return None
    return RunState(_run_of(found), [_row_of(row) for row in _ROWS.rows({"run_id": run_id})])


def _run_of(values: tuple[Any, ...]) -> Run:
    run, fields = Run(), Run._meta.fields
    for name, value in zip(RUN_COLUMNS, values, strict=True):
        run.__data__[name] = fields[name].python_value(value)
    return run


def _row_of(values: tuple[Any, ...]) -> StepRow:
    columns = dict(zip(LIGHT, values, strict=True))
    for name, convert in _CONVERTED.items():
        columns[name] = convert(columns[name])
    return StepRow(**columns)


def read_values(ids: list[str]) -> dict[str, tuple[Any, Any]]:
    """Return the inputs and outputs of steps, keyed by step id."""
    found: Any = StepRun.select(StepRun.id, StepRun.input, StepRun.output).where(StepRun.id.in_(ids)).tuples()
    return {row[0]: (row[1], row[2]) for row in found}


def claim_revision(state: RunState) -> bool:
    """Write the changed columns of the run.

    If the run has changed since it was read, return False and write nothing.
    """
    changes = {**state.changes, "revision": state.run.revision + 1}
    guards = {"id": state.run.id, "revision": state.run.revision}
    return bool(update_row(Run, changes, guards))


def write_rows(state: RunState) -> None:
    """Insert the new rows and update the changed rows. Call `claim_revision` first, because it locks the run."""
    for row in state.rows.values():
        if row.is_new:
            _INSERT.run(_encoded(StepRun, _columns(state.run.id, row)))
        elif row.changes:
            update_row(StepRun, row.changes, {"id": row.id})


def update_row(model: type[Run | StepRun], changes: Json, guards: Json) -> int:
    """Change columns of the row that has the values in `guards`. Return the number of changed rows."""
    statement = _update_statement(model, tuple(changes), tuple(guards))
    return statement.run(_encoded(model, changes) | {f"old {name}": value for name, value in guards.items()})


@functools.lru_cache(maxsize=500)
def _update_statement(model: Any, columns: tuple[str, ...], guards: tuple[str, ...]) -> Statement:
    """Return the compiled UPDATE statement for these columns.

    The statement is cached because advancing a run updates the same few sets of columns again and again.
    """

    def build(p: Any) -> Any:
        where = [getattr(model, name) == p(f"old {name}") for name in guards]
        return model.update({getattr(model, name): p(name) for name in columns}).where(*where)

    return Statement(build)


def _encoded(model: Any, values: Json) -> Json:
    """Return the values in the form that the database driver expects."""
    fields = model._meta.fields
    return {name: fields[name].db_value(value) for name, value in values.items()}


def _columns(run_id: str, row: StepRow) -> Json:
    fields = msgspec.structs.asdict(row)
    del fields["is_new"], fields["changes"]
    for name in ("input", "output"):
        fields[name] = None if fields[name] is UNSET else fields[name]
    return {**fields, "run_id": run_id}
