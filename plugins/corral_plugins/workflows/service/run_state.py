"""The rows of one run in memory, while an advance of the run is computed, and how the changes are written.

Rows are read without their inputs and outputs, which may be large; those are read when an expression needs them. They
cannot change in the meantime, because the changes are written only if the revision of the run is still the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from corral import clock
from corral.ids import new_id
from corral_plugins.workflows.models import Run, StepRun
from corral_plugins.workflows.service.graph import Step

FINAL = ("completed", "failed", "skipped", "cancelled")
FINAL_RUN = ("completed", "failed", "cancelled")
Json = dict[str, Any]


class StepRow(msgspec.Struct, kw_only=True):
    """A step of a run. `input` and `output` are `UNSET` until they are read. Assign with `set`, which keeps track."""

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
        """Change columns. The changes are written at the end of the advance."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.changes = {**self.changes, **changes}

    @property
    def is_open(self) -> bool:
        """Whether the step has not ended."""
        return self.status not in FINAL

    @property
    def succeeded(self) -> bool:
        """Whether steps that need this one may run.

        A person may let the run go on after a failed step. After a jump, only the target runs.
        """
        return (self.status == "completed" and self.goto is None) or (
            self.status == "skipped" and self.reason == "resolved"
        )


LIGHT = tuple(
    getattr(StepRun, name) for name in StepRow.__struct_fields__ if name not in ("input", "output", "is_new", "changes")
)


class RunState:
    """The run and its steps by key. `changes` are the changed columns of the run."""

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
        """Return the row of a step that is visible from an iteration, or None if the step has not been reached."""
        return self.rows.get(row_key(step.name, iteration[: step.loops]))

    def add(self, step: Step, iteration: tuple[int, ...], status: str) -> StepRow:
        """Add a row for a step that has been reached."""
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
    run: Run | None = Run.get_or_none(Run.id == run_id)
    if run is None:
        return None
    found: Any = StepRun.select(*LIGHT).where(StepRun.run_id == run_id).order_by(StepRun.id).dicts()
    return RunState(run, [StepRow(**row) for row in found])


def read_values(ids: list[str]) -> dict[str, tuple[Any, Any]]:
    """Return the inputs and outputs of steps by id."""
    found: Any = StepRun.select(StepRun.id, StepRun.input, StepRun.output).where(StepRun.id.in_(ids)).tuples()
    return {row[0]: (row[1], row[2]) for row in found}


def claim_revision(state: RunState) -> bool:
    """Write the changed columns of the run if nobody has changed the run since it was read. Return whether it was."""
    changes = {**state.changes, "revision": state.run.revision + 1}
    unchanged = (Run.id == state.run.id) & (Run.revision == state.run.revision)
    return bool(Run.update(changes).where(unchanged).execute())


def write_rows(state: RunState) -> None:
    """Insert the new rows and update the changed ones. Call `claim_revision` first, which locks the run."""
    new = [row for row in state.rows.values() if row.is_new]
    if new:
        StepRun.insert_many([_columns(state.run.id, row) for row in new]).execute()
    for row in state.rows.values():
        if row.changes and not row.is_new:
            StepRun.update(row.changes).where(StepRun.id == row.id).execute()


def _columns(run_id: str, row: StepRow) -> Json:
    fields = msgspec.structs.asdict(row)
    del fields["is_new"], fields["changes"]
    for name in ("input", "output"):
        fields[name] = None if fields[name] is UNSET else fields[name]
    return {**fields, "run_id": run_id}
