"""The units of work of everything that is active: they touch rows only, and bulk work comes in pieces.

The numbers are those of the rules in docs/concepts/unit-of-work.md.
"""

from __future__ import annotations

import sys
import sysconfig
import time
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import argon2
import pytest
from tests.engines import SQLITE
from tests.generated.world import World

from corral import clock
from corral.database.model import Model
from corral.database.pool import DatabaseThread
from corral.database.unit import current, in_unit
from corral.http.idempotency import IdempotencyRow
from corral.ids import new_id
from corral.jobs.job import JobRow
from corral.testing.kit import Kit
from corral_core.accounts.models import LockoutRow, RefreshRow, SessionRow, TicketRow

CODE = (".py", ".pyc", ".so", "entry_points.txt")  # an import reads them, once
OUTSIDE = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "open", "os.remove", "os.rename")
PYTHON = (sys.base_prefix, *(sysconfig.get_path(name) for name in ("stdlib", "purelib")), *zoneinfo.TZPATH)
LONG_AGO = "2020-01-01T00:00:00.000Z"
MANY, AT_ONCE = 1_100, 500

_touched: list[str] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in OUTSIDE or not in_unit():
        return
    what = str(arguments[0]) if arguments else ""
    if event != "open" or not (what.endswith(CODE) or what.startswith(PYTHON)):
        _touched.append(f"{current().entry.label}: {event} {what}")


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What units did beside reading and writing rows."""
    if not getattr(sys, "_corral_units_watched", False):
        sys.addaudithook(_watch)
        sys._corral_units_watched = True  # type: ignore[attr-defined]  # a hook cannot be taken away
    for owner, name in ((argon2.PasswordHasher, "hash"), (argon2.PasswordHasher, "verify"), (time, "sleep")):
        plain = getattr(owner, name)

        def watched(*arguments: Any, plain: Callable[..., Any] = plain, name: str = name) -> Any:
            if in_unit():
                _touched.append(f"{current().entry.label}: {name}")
            return plain(*arguments)

        monkeypatch.setattr(owner, name, watched)
    _touched.clear()
    _watching.append(True)
    yield _touched
    _watching.clear()


@pytest.mark.one_engine
async def test_unit_of_work_2_no_operation_touches_anything_but_rows(make_world: Any, touched: list[str]) -> None:
    world: World = await make_world()
    await world.kit.work(lambda: time.sleep(0.001))
    assert touched.pop() == "work: sleep"  # what a unit does is seen
    accepted = 0
    operations = [each for each in world.operations if not each.path.endswith("/stream")]
    for operation in sorted(operations, key=lambda each: (each.method != "GET", each.path.startswith("/auth"))):
        for client in (world.worker, world.admin):
            path = operation.at() + operation.sample_query()
            answer = await client.request(operation.method, path, operation.sample_body())
            accepted += answer.status < 300
    await world.kit.run_jobs()
    assert sorted({*touched}) == []
    assert accepted > len(operations) / 4


def expired(count: int) -> dict[type[Model], list[dict[str, Any]]]:
    """Rows that are old enough to be deleted or emptied, of tables whose rows come by the thousand."""
    now = clock.now()
    session: dict[str, Any] = {"user_id": new_id(), "ip": "192.0.2.1", "user_agent": "x", "last_seen_at": LONG_AGO}
    refresh: dict[str, Any] = {"created_at": now, "expires_at": clock.now(1e6), "used_at": LONG_AGO, "successor": "00"}
    key: dict[str, Any] = {"body_hash": "x", "state": "done", "until": LONG_AGO, "created_at": LONG_AGO}
    old = {"created_at": LONG_AGO, "run_at": LONG_AGO, "finished_at": LONG_AGO}
    return {
        JobRow: [{"id": new_id(), "name": "some.job", "state": "done", **old} for _ in range(count)],
        IdempotencyRow: [{"key": f"k{number}", **key} for number in range(count)],
        SessionRow: [
            {"id": new_id(), **session, "created_at": LONG_AGO, "expires_at": LONG_AGO, "ended_at": LONG_AGO}
            for _ in range(count)
        ],
        TicketRow: [{"hash": f"h{number}", "caller": {}, "expires_at": LONG_AGO} for number in range(count)],
        LockoutRow: [{"key": f"k{number}", "reserved_until": LONG_AGO} for number in range(count)],
        RefreshRow: [{"hash": f"h{number}", "session_id": new_id(), **refresh} for number in range(count)],
    }


@SQLITE
async def test_unit_of_work_8_sweeps_change_at_most_500_rows_a_unit(
    make_kit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit: Kit = await make_kit(plugins=[])
    rows = expired(MANY)

    def insert(model: type[Model], values: list[dict[str, Any]]) -> None:
        model.insert_many(values).as_rowcount().execute()

    for model, values in rows.items():
        await kit.work(partial(insert, model, values))
    changed: Counter[str] = Counter()
    plain = DatabaseThread.run_unit

    def counted(thread: Any, unit: Any, queued: Any) -> Any:
        before = unit.connection.total_changes
        value = plain(thread, unit, queued)
        label = queued.entry.label
        changed[label] = max(changed[label], unit.connection.total_changes - before)
        return value

    monkeypatch.setattr(DatabaseThread, "run_unit", counted)
    for name in ("jobs.prune", "accounts.purge_sessions", "accounts.forget_successors"):
        await kit.run_schedule(name)
    left = {model.__name__: await kit.work(model.select().count, read=True) for model in rows}
    kept = RefreshRow.select().where(RefreshRow.successor.is_null(False)).count
    assert left == {**dict.fromkeys(left, 0), "RefreshRow": MANY}
    assert await kit.work(kept, read=True) == 0
    assert max(changed.values()) == AT_ONCE, changed
