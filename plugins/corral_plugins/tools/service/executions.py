"""The execution of tools that run on the server.

Each call runs in its own asyncio task, so that it is not interrupted when the client disconnects. A `def` tool runs in
the unit of work that stores the result, so that the effect and the result commit together. An `async def` tool runs
between two units of work, until its time limit passes or the lease ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, Problem, Unavailable
from corral.events.live_feed import Feed
from corral.redact.redactor import Redactor, redacting_machine_text
from corral_plugins.approvals.api import Approvals
from corral_plugins.files.api import Files, FileSource
from corral_plugins.tasks.api import Tasks
from corral_plugins.tools.api import ResultLater, ToolContext, ToolFailure, ToolOutput
from corral_plugins.tools.models import ToolCallRow
from corral_plugins.tools.service import call_store
from corral_plugins.tools.service.call_store import is_long_output, to_json, truncate_output
from corral_plugins.tools.service.held_call_outcomes import HeldResults
from corral_plugins.tools.service.metrics import ToolMetrics
from corral_plugins.tools.service.registry import RegisteredTool
from corral_plugins.tools.shapes import ToolCallView

log = logging.getLogger("corral.tools")

WATCH_SECONDS = 5.0
STOP_SECONDS = 5.0
RETRY_PAUSES = (0.2, 1.0, 3.0)
INTERRUPTED, UNKNOWN = "interrupted", "outcome_unknown"
SENTENCES = {
    INTERRUPTED: "The call was interrupted; it can be repeated.",
    UNKNOWN: "The call was interrupted; whether it had an effect is unknown.",
}


class ToolExecution(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call that runs in this process.

    The process may write to the row of the call only while the row's `executions` column equals the field `executions`.
    For an approved call, `approval_id` is the id of the approval, and `payload_sha256` is the hash of the approved
    payload.
    """

    row_id: str
    executions: int
    tool: RegisteredTool
    context: ToolContext
    arguments: dict[str, Any]
    entry: UnitContext
    approval_id: str | None = None
    payload_sha256: str = ""


class ToolOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """The redacted outcome of a tool call. `untrusted` lists the untrusted sources of the result."""

    result: Any = None
    error: dict[str, Any] | None = None
    untrusted: tuple[str, ...] = ()


class ToolExecutions:
    """Runs the server's tools, and stores the outcomes of the calls."""

    approvals: Approvals | None
    files: Files | None
    tasks: Tasks | None

    def __init__(self, work: Work, feed: Feed, redactor: Redactor, metrics: ToolMetrics, results: HeldResults) -> None:
        self._work, self._feed, self._redactor, self._metrics = work, feed, redactor, metrics
        self._results = results
        self._running: set[asyncio.Task[Any]] = set()

    async def run_tool(self, execution: ToolExecution) -> ToolCallView:
        """Run a tool until it ends, store the outcome, and return the call."""
        return await asyncio.shield(self._start_task(execution))

    async def run_approved(self, execution: ToolExecution) -> None:
        """Run an approved tool for a job.

        The job waits until a `def` tool ends, but does not wait for an `async def` tool.
        """
        task = self._start_task(execution)
        if not inspect.iscoroutinefunction(execution.tool.definition.run):
            await asyncio.shield(task)

    def _start_task(self, execution: ToolExecution) -> asyncio.Task[ToolCallView]:
        task = asyncio.get_running_loop().create_task(self._execute_tool(execution), name=f"tool {execution.tool.name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def stop_running(self) -> None:
        """Wait up to `STOP_SECONDS` (5 seconds) for the running calls to end, then cancel the remaining calls."""
        if self._running:
            _, left = await asyncio.wait(set(self._running), timeout=STOP_SECONDS)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _execute_tool(self, execution: ToolExecution) -> ToolCallView:
        if not inspect.iscoroutinefunction(execution.tool.definition.run):
            try:
                return await self._work(lambda: self._run_in_unit(execution), entry=execution.entry)
            except Exception as error:
                outcome = self._error_outcome(execution, error)
        else:
            outcome = await self._run_async(execution)
        return await self._store_outcome(execution, outcome)

    # -- `def` tools

    def _run_in_unit(self, execution: ToolExecution) -> ToolCallView:
        """Run a tool and store the outcome in one unit of work.

        If an exception is raised, the effects of the tool and the outcome are both rolled back.
        """
        row = self._lock_call(execution)
        assert execution.tool.definition.run is not None
        value = execution.tool.definition.run(execution.context, execution.arguments)
        if isinstance(value, ResultLater):
            call_store.update_call_row(row, alive_until=None)
            return call_store.call_view(row)
        outcome = self._outcome_of(execution, value)
        shown = msgspec.structs.replace(outcome, result=truncate_output(outcome.result))
        return self._write_outcome(execution, row, shown)

    def _lock_call(self, execution: ToolExecution) -> ToolCallRow:
        """Lock the task of a call and return the call's row.

        Raise `Conflict` if the lease has ended or this execution no longer owns the row. An approved call may continue
        while its task waits. This method marks the approval as used, unless that has already happened.
        """
        assert self.tasks is not None
        context, approval_id = execution.context, execution.approval_id
        if approval_id is None:
            self.tasks.lock_run(context.task_id, context.lease_id, by=context.caller)
        else:
            self.tasks.lock_held_run(context.task_id, context.lease_id, approval_id=approval_id)
        row = call_store.find_call_by_id(execution.row_id)
        if approval_id is not None and row.status == "pending_approval":
            assert self.approvals is not None
            self.approvals.consume(approval_id, payload_sha256=execution.payload_sha256)
            call_store.update_call_row(row, status="running")
        if row.status != "running" or row.executions != execution.executions:
            raise Conflict(
                "Another process has ended or taken over this call; fetch the call again.", current_status=row.status
            )
        return row

    # -- `async def` tools

    async def _run_async(self, execution: ToolExecution) -> ToolOutcome:
        run: Any = execution.tool.definition.run
        context = msgspec.structs.replace(execution.context, approval_id=execution.approval_id)
        work = asyncio.ensure_future(run(context, execution.arguments))
        watch = asyncio.ensure_future(self._watch_lease(execution))
        try:
            async with asyncio.timeout(execution.tool.timeout_seconds):
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    return ToolOutcome(error=_interrupted_error(execution))
                value = work.result()
            outcome = await asyncio.to_thread(self._outcome_of, execution, value)
            return await self._truncated(execution, outcome)
        except TimeoutError:
            detail = f"{execution.tool.name} took longer than {execution.tool.timeout_seconds} seconds."
            return ToolOutcome(error={"type": "timeout", "message": detail})
        except Exception as error:
            return self._error_outcome(execution, error)
        finally:
            for each in (work, watch):
                each.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _watch_lease(self, execution: ToolExecution) -> None:
        """Wait until the lease of a call ends. In the meantime, record every few seconds that the call is still alive.

        An event about the task triggers an immediate check of the lease.
        """
        context, recorded_at = execution.context, time.monotonic()

        def check(record: bool) -> bool:
            assert self.tasks is not None
            if record:
                call_store.record_alive(execution.row_id, execution.executions)
            if execution.approval_id is not None:
                return self.tasks.is_held(context.task_id, context.lease_id, approval_id=execution.approval_id)
            return self.tasks.live_lease(context.task_id, context.lease_id) is not None

        while True:
            with self._feed.subscribe((context.task_id,)) as notified, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await notified.wait()
            record = time.monotonic() - recorded_at >= WATCH_SECONDS / 2
            with contextlib.suppress(Unavailable):  # an overloaded database does not mean that the lease has ended
                if not await self._work(functools.partial(check, record), entry=execution.entry, read=not record):
                    return
                recorded_at = time.monotonic() if record else recorded_at

    async def _store_outcome(self, execution: ToolExecution, outcome: ToolOutcome) -> ToolCallView:
        """Store the outcome. Retry up to three times while the database is unavailable."""
        for pause in RETRY_PAUSES:
            with contextlib.suppress(Unavailable):
                return await self._work(lambda: self._try_store(execution, outcome), entry=execution.entry)
            await asyncio.sleep(pause)
        return await self._work(lambda: self._try_store(execution, outcome), entry=execution.entry)

    def _try_store(self, execution: ToolExecution, outcome: ToolOutcome) -> ToolCallView:
        """Store the outcome, or an `interrupted` or `outcome_unknown` error instead if the lease has ended."""
        assert self.tasks is not None
        try:
            row = self._lock_call(execution)
        except Problem:
            row = call_store.find_call_by_id(execution.row_id)
            if row.status != "running" or row.executions != execution.executions:
                return call_store.call_view(row)
            outcome = ToolOutcome(error=_interrupted_error(execution))
        return self._write_outcome(execution, row, outcome)

    def _write_outcome(self, execution: ToolExecution, row: ToolCallRow, outcome: ToolOutcome) -> ToolCallView:
        assert self.tasks is not None
        status = "succeeded" if outcome.error is None else "failed"
        tainted = False
        if outcome.untrusted and outcome.error is None:
            tainted = True
            if self.tasks.taint_run(row.task_id, row.lease_id, outcome.untrusted):
                self._metrics.count_tainted_attempt()
        call_store.end_call(row, status, result=outcome.result, error=outcome.error, tainted=tainted)
        self._metrics.observe_duration(execution.tool, row.duration_ms or 0)
        self._results.deliver(row)
        return call_store.call_view(row)

    # -- outcomes

    def _outcome_of(self, execution: ToolExecution, value: Any) -> ToolOutcome:
        definition = execution.tool.definition
        untrusted = value.untrusted if isinstance(value, ToolOutput) else ()
        if definition.untrusted_output:
            untrusted = (*untrusted, source_of(definition.name, execution.arguments))
        found = to_json(value.value if isinstance(value, ToolOutput) else value)
        with redacting_machine_text("task", execution.context.task_id):
            return ToolOutcome(result=self._redactor.redact_json(found), untrusted=untrusted)

    async def _truncated(self, execution: ToolExecution, outcome: ToolOutcome) -> ToolOutcome:
        """Truncate a long result.

        The whole result is stored as a file of the task, if possible. Storing it fails if, for example, the requester's
        quota is used up.
        """
        file_id = None
        if self.files is not None and is_long_output(outcome.result):
            text = isinstance(outcome.result, str)
            content = outcome.result.encode() if text else msgspec.json.encode(outcome.result)
            context, tool = execution.context, execution.tool.name
            with contextlib.suppress(Problem):
                stored = await self.files.put(
                    _in_one_chunk(content),
                    name=f"{tool}.{'txt' if text else 'json'}",
                    owner_id=context.caller.user_id or "",
                    task_id=context.task_id,
                    source=FileSource(type="agent", id=context.caller.agent_id),
                )
                file_id = stored.id
        return msgspec.structs.replace(outcome, result=truncate_output(outcome.result, file_id=file_id))

    def _error_outcome(self, execution: ToolExecution, error: Exception) -> ToolOutcome:
        """Convert an exception into an error for the model.

        Details of an unexpected exception are only logged.
        """
        if isinstance(error, ToolFailure):
            error_data = {"type": error.type, "message": error.message}
        elif isinstance(error, Problem):
            error_data = {"type": error.code, "message": error.detail}
            if error.errors:
                error_data["message"] += " " + "; ".join(f"{each.pointer}: {each.detail}" for each in error.errors[:10])
        else:
            log.error("a tool raised an exception", exc_info=error, extra={"tool": execution.tool.name})
            error_data = {
                "type": "internal",
                "message": f"{execution.tool.name} failed with an internal error; see the server's log.",
            }
        return ToolOutcome(error=truncate_output(self._redactor.redact_json(error_data)))


def source_of(tool: str, arguments: dict[str, Any]) -> str:
    """Return the name of an untrusted source: the name of the tool and, if the tool read a URL, the URL."""
    url = arguments.get("url")
    return f"{tool} {url}"[:300] if isinstance(url, str) else tool


async def _in_one_chunk(content: bytes) -> AsyncIterator[bytes]:
    yield content


def can_repeat(tool: RegisteredTool | None) -> bool:
    """Return whether a call with an unknown outcome may run again.

    A call may run again if the tool is idempotent, or if the effect of the tool commits together with the stored
    result.
    """
    if tool is None:
        return False
    definition = tool.definition
    return definition.idempotent or (definition.run is not None and not inspect.iscoroutinefunction(definition.run))


def _interrupted_error(execution: ToolExecution) -> dict[str, Any]:
    """Return the error for an interrupted call. An approved call is never treated as repeatable."""
    return interrupted_error(execution.approval_id is None and can_repeat(execution.tool))


def interrupted_error(can_repeat: bool) -> dict[str, Any]:
    """Return the error for an interrupted call: `interrupted` if it can be repeated, or else `outcome_unknown`."""
    type = INTERRUPTED if can_repeat else UNKNOWN
    return {"type": type, "message": SENTENCES[type]}
