"""The unit of work: one transaction in which rows, audit rows, jobs and events are written together.

A unit is bound to the thread that runs it. Services that are called inside a unit join it; outside a unit, they raise
`NoUnit`.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from corral.errors import NestedUnit, NoUnit

if TYPE_CHECKING:
    from corral.database.engine import Database


class Actor(msgspec.Struct, frozen=True):
    """The caller that started a unit of work. `type` is `user`, `api_key`, `worker`, `agent`, `system` or `anonymous`.

    `on_behalf_of` is the id of the person whose permissions apply, if the actor is not that person.
    """

    type: str
    id: str | None = None
    on_behalf_of: str | None = None
    session_id: str | None = None
    key_id: str | None = None


SYSTEM = Actor("system")
ANONYMOUS = Actor("anonymous")


class UnitContext(msgspec.Struct, frozen=True):
    """The context in which a unit was started.

    `label` names the route, job or command in logs. `actor` is the caller, and `cause` lists the ids of the objects,
    such as triggers and tasks, that led to this unit.

    On SQLite, a unit with `durable=False` does not wait until its rows are on the disk. The rows survive a crash of the
    process, but possibly not a power failure (docs/adr/0025). Use `durable=False` only for changes whose success is not
    reported to anyone.
    """

    label: str = "work"
    actor: Actor = SYSTEM
    cause: tuple[str, ...] = ()
    request_id: str | None = None
    client_ip: str | None = None
    user_agent: str | None = None
    durable: bool = True


SYSTEM_CONTEXT = UnitContext()


class Unit(msgspec.Struct, eq=False):
    """The running unit of work. At its end, its `before` callbacks run, and then it writes its audit rows and jobs.

    `jobs` contains the rows of its jobs, and `collected` the items that `collect` was called with, each with the
    function that writes it. `after` callbacks run once on the event loop after COMMIT. They must neither fail nor
    block. Services use `memo` to cache data that they have read in the unit; each service uses itself as the key.
    """

    database: Database
    connection: Any
    entry: UnitContext
    read_only: bool
    before: list[Callable[[], None]] = []
    audit: list[Callable[[], None]] = []
    jobs: list[tuple[Callable[[list[Any]], None], Any]] = []
    collected: list[tuple[Callable[[list[Any]], None], Any]] = []
    after: list[Callable[[], None]] = []
    memo: dict[object, Any] = {}

    def is_open(self) -> bool:
        """Return whether the transaction is still open. A lost connection or a full disk ends it."""
        used = self.connection
        return bool(used.in_transaction if self.database.kind == "sqlite" else not (used.closed or used.broken))

    def finish(self) -> None:
        """Run the `before` callbacks, then write the audit rows and the jobs, in this order."""
        for call in itertools.chain(self.before, self.audit):
            call()
        write_collected(self.jobs)


class _Local(threading.local):
    unit: Unit | None = None


_local = _Local()


def current() -> Unit:
    """Return the unit of work of this thread. Raise `NoUnit` when there is none."""
    unit = _local.unit
    if unit is None:
        raise NoUnit("no unit of work is running: enter one through a handler, a job or `await work(fn)`")
    return unit


def locked(query: Any, *, share: bool = False, skip_locked: bool = False) -> Any:
    """Return the query with a clause that locks the selected rows until the unit of work ends.

    No other unit can change the locked rows. With `share`, other units may take the same shared lock. With
    `skip_locked`, rows that other units have locked are left out. SQLite has only one writer, so no row needs a lock
    there.
    """
    if current().database.kind == "sqlite":
        return query
    return query.for_update("FOR SHARE" if share else "FOR UPDATE", skip_locked=skip_locked)


def in_unit() -> bool:
    """Return whether this thread is inside a unit of work."""
    return _local.unit is not None


def refuse_nesting() -> None:
    """Raise `NestedUnit` if this thread is inside a unit of work."""
    if _local.unit is not None:
        raise NestedUnit("already inside a unit of work: call the function directly, so that it joins the unit")


def run_in_unit(unit: Unit, fn: Callable[[], Any]) -> Any:
    """Run `fn` with `unit` as the current unit of work of this thread, which must not be inside another one."""
    _local.unit = unit
    try:
        return fn()
    except (StopIteration, SystemExit) as error:  # a future cannot raise the former; the latter would end the process
        raise RuntimeError(f"the unit of work raised {type(error).__name__}") from error
    finally:
        _local.unit = None


def after_commit(fn: Callable[[], None]) -> None:
    """Call `fn` on the event loop after the current unit of work has committed.

    Change caches only in such functions.
    """
    current().after.append(fn)


def before_commit(fn: Callable[[], None]) -> None:
    """Call `fn` at the end of the current unit of work.

    Use this function to write rows that must be locked only briefly, such as counters.
    """
    current().before.append(fn)


def collect(write: Callable[[list[Any]], None], item: Any) -> None:
    """Collect an item for `write`, which is called once before COMMIT.

    It is called with the items of all units of work that are committed together.

    On SQLite, up to 64 units are committed together, so a counter, for example, is updated once for all of them. Until
    then, later units of the transaction see this unit's rows, but not the items that it has collected. `write` runs
    after all units have ended. Events that it emits and items that it collects are lost.
    """
    current().collected.append((write, item))


def write_collected(pairs: Iterable[tuple[Callable[[list[Any]], None], Any]]) -> None:
    """Call each function once with its items, in the order in which the functions first occur."""
    collected: defaultdict[Callable[[list[Any]], None], list[Any]] = defaultdict(list)
    for write, item in pairs:
        collected[write].append(item)
    for write, items in collected.items():
        write(items)
