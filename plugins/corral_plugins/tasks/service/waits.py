"""How a run gives up its lease until a person has answered: its clocks stop until then."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.ids import new_id
from corral.schema.data import check_user_schema
from corral_plugins.tasks.events import TaskWaiting
from corral_plugins.tasks.reports import AskedInput
from corral_plugins.tasks.service.moves import NOT_CANCELLED, Moves
from corral_plugins.tasks.service.rows import Ledger, Row


def check_question(asked: AskedInput) -> None:
    """Raise `Invalid` unless a person can be asked this."""
    if asked.schema is not None:
        check_user_schema(asked.schema, pointer_prefix="/input/schema")


def wait_for_input(
    moves: Moves, row: Row, attempt: Ledger, asked: AskedInput, *, by: str, call_id: str | None = None
) -> None:
    """`running` becomes `waiting`. `call_id`: the call of a tool whose result the answer will be."""
    now = clock.now()
    until = clock.now(asked.expires_in_seconds) if asked.expires_in_seconds is not None else None
    waiting_for: dict[str, Any] = {
        "kind": "input",
        "id": new_id(),
        "since": now,
        "prompt": asked.prompt,
        "schema": asked.schema,
        "expires_at": until,
    }
    if call_id is not None:
        waiting_for["call_id"] = call_id
    moves.off_lease(
        row,
        attempt,
        "waiting",
        ledger="waiting",
        by=by,
        event=TaskWaiting,
        named={"waiting_for": waiting_for},
        waiting_for=waiting_for,
        waiting_kind="input",
        waiting_until=until,
        resuming=True,
        used_ms=row.used_ms + clock.elapsed_ms(row.started_at or now, now),
        **NOT_CANCELLED,
    )
