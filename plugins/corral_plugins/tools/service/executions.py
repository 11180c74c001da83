"""Running server tools: each call in a task of its own, so that a client that leaves does not cut it.

A tool that is `def` runs in the unit that stores its result: its effect and the record are one. An `async def` runs
between two units, under its time limit, while the lease lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import time
from typing import Any

import msgspec

from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Problem, Unavailable
from corral.events.feed import Feed
from corral.redact.redactor import Redactor, made_by
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import Later, Output, ToolContext, ToolFailure
from corral_plugins.tools.models import ToolCall
from corral_plugins.tools.service import ledger
from corral_plugins.tools.service.figures import Figures
from corral_plugins.tools.service.output import fitted, plain
from corral_plugins.tools.service.registry import Known
from corral_plugins.tools.shapes import CallView

log = logging.getLogger("corral.tools")

LOOK_SECONDS = 5.0
STOP_SECONDS = 5.0
SETTLE_PAUSES = (0.2, 1.0, 3.0)
INTERRUPTED, UNKNOWN = "interrupted", "outcome_unknown"
SENTENCES = {
    INTERRUPTED: "The call was cut short; it may be repeated.",
    UNKNOWN: "The call was cut short; whether it had its effect is not known.",
}


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A call whose row says that it runs here. `executions` fences it."""

    row_id: str
    executions: int
    known: Known
    context: ToolContext
    arguments: dict[str, Any]
    entry: Entry


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a tool ended, redacted and fitted."""

    result: Any = None
    error: dict[str, Any] | None = None
    untrusted: tuple[str, ...] = ()


class Executions:
    """The only one that runs server tools and writes how they ended."""

    tasks: Tasks | None

    def __init__(self, work: Work, feed: Feed, redactor: Redactor, figures: Figures) -> None:
        self._work, self._feed, self._redactor, self._figures = work, feed, redactor, figures
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, begun: Begun) -> CallView:
        """Run the tool to its end; the call as it is then."""
        task = asyncio.get_running_loop().create_task(self._to_its_end(begun), name=f"tool {begun.known.name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """Give what runs a few seconds, then cut it."""
        if self._running:
            _, left = await asyncio.wait(set(self._running), timeout=STOP_SECONDS)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _to_its_end(self, begun: Begun) -> CallView:
        if not inspect.iscoroutinefunction(begun.known.tool.run):
            try:
                return await self._work(lambda: self._in_unit(begun), entry=begun.entry)
            except Exception as error:
                ending = self._failed(begun, error)
        else:
            ending = await self._between_units(begun)
        return await self._written(begun, ending)

    # -- in a unit

    def _in_unit(self, begun: Begun) -> CallView:
        """The effect of the tool and the record of it, in one unit; whatever raises undoes both."""
        row = self._locked(begun)
        assert begun.known.tool.run is not None
        value = begun.known.tool.run(begun.context, begun.arguments)
        if isinstance(value, Later):
            ledger.change(row, alive_until=None)
            return ledger.view(row)
        return self._write(begun, row, self._done(begun, value))

    def _locked(self, begun: Begun) -> ToolCall:
        """The row, if it is still this execution's and the lease lives. The task's lock comes first, as everywhere."""
        assert self.tasks is not None
        self.tasks.run(begun.context.task_id, begun.context.lease_id, by=begun.context.caller)
        row = ledger.by_id(begun.row_id)
        if row.status != "running" or row.executions != begun.executions:
            raise Conflict("Another process runs this call.", current_status=row.status)
        return row

    # -- between two units

    async def _between_units(self, begun: Begun) -> Ending:
        run: Any = begun.known.tool.run
        work = asyncio.ensure_future(run(begun.context, begun.arguments))
        watch = asyncio.ensure_future(self._watch(begun))
        try:
            async with asyncio.timeout(begun.known.timeout_seconds):
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    return Ending(error=_cut(begun.known))
                value = work.result()
            return await asyncio.to_thread(self._done, begun, value)
        except TimeoutError:
            told = f"{begun.known.name} took longer than {begun.known.timeout_seconds} seconds."
            return Ending(error={"type": "timeout", "message": told})
        except Exception as error:
            return self._failed(begun, error)
        finally:
            for each in (work, watch):
                each.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _watch(self, begun: Begun) -> None:
        """Say every few seconds that the call lives; return when its lease has ended, of which a bell tells."""
        context, told = begun.context, time.monotonic()

        def look(say: bool) -> bool:
            assert self.tasks is not None
            if say:
                ledger.keep_alive(begun.row_id, begun.executions)
            return self.tasks.live_lease(context.task_id, context.lease_id) is not None

        while True:
            with self._feed.waiting((context.task_id,)) as rung, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await rung.wait()
            say = time.monotonic() - told >= LOOK_SECONDS / 2
            with contextlib.suppress(Unavailable):  # a busy database says nothing about the lease
                if not await self._work(functools.partial(look, say), entry=begun.entry, read=not say):
                    return
                told = time.monotonic() if say else told

    async def _written(self, begun: Begun, ending: Ending) -> CallView:
        """What happened is not lost because the database is busy for a moment."""
        for pause in SETTLE_PAUSES:
            with contextlib.suppress(Unavailable):
                return await self._work(lambda: self._settle(begun, ending), entry=begun.entry)
            await asyncio.sleep(pause)
        return await self._work(lambda: self._settle(begun, ending), entry=begun.entry)

    def _settle(self, begun: Begun, ending: Ending) -> CallView:
        """Write how it ended. When the lease has ended meanwhile the result goes nowhere."""
        assert self.tasks is not None
        try:
            row = self._locked(begun)
        except Problem:
            row = ledger.by_id(begun.row_id)
            if row.status != "running" or row.executions != begun.executions:
                return ledger.view(row)
            ending = Ending(error=_cut(begun.known))
        return self._write(begun, row, ending)

    def _write(self, begun: Begun, row: ToolCall, ending: Ending) -> CallView:
        assert self.tasks is not None
        status = "succeeded" if ending.error is None else "failed"
        tainted = False
        if ending.untrusted and ending.error is None:
            tainted = True
            if self.tasks.taint(row.task_id, row.lease_id, ending.untrusted):
                self._figures.tainted()
        ledger.end(row, status, result=ending.result, error=ending.error, tainted=tainted)
        self._figures.ended(begun.known, row.duration_ms or 0)
        return ledger.view(row)

    # -- what came of it

    def _done(self, begun: Begun, value: Any) -> Ending:
        tool = begun.known.tool
        untrusted = value.untrusted if isinstance(value, Output) else ()
        if tool.untrusted_output:
            untrusted = (*untrusted, source_of(tool.name, begun.arguments))
        found = plain(value.value if isinstance(value, Output) else value)
        with made_by("task", begun.context.task_id):
            return Ending(result=fitted(self._redactor.redact_json(found)), untrusted=untrusted)

    def _failed(self, begun: Begun, error: Exception) -> Ending:
        """What went wrong, for the model; a bug is told in the log only."""
        if isinstance(error, ToolFailure):
            told = {"type": error.type, "message": error.message}
        elif isinstance(error, Problem):
            told = {"type": error.code, "message": error.detail}
            if error.errors:
                told["message"] += " " + "; ".join(f"{each.pointer}: {each.detail}" for each in error.errors[:10])
        else:
            log.error("a tool raised", exc_info=error, extra={"tool": begun.known.name})
            told = {"type": "internal", "message": f"{begun.known.name} failed with a bug; the server's log has it."}
        return Ending(error=fitted(self._redactor.redact_json(told)))


def source_of(tool: str, arguments: dict[str, Any]) -> str:
    """The name of an untrusted source: the tool, and the address it read where there is one."""
    url = arguments.get("url")
    return f"{tool} {url}"[:300] if isinstance(url, str) else tool


def repeatable(known: Known | None) -> bool:
    """Whether a call of which nobody knows how it ended may run again: idempotent, or its effect is in the record."""
    if known is None:
        return False
    tool = known.tool
    return tool.idempotent or (tool.run is not None and not inspect.iscoroutinefunction(tool.run))


def _cut(known: Known) -> dict[str, Any]:
    return cut_short(repeatable(known))


def cut_short(may_repeat: bool) -> dict[str, Any]:
    """The error of a call whose end nobody saw."""
    type = INTERRUPTED if may_repeat else UNKNOWN
    return {"type": type, "message": SENTENCES[type]}
