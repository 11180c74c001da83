"""Executes the steps whose work is done in this process: calls to models, HTTP services and tools.

A step is executed under a lease, which this process renews. If the process dies, another process takes over the step
when the lease has expired, and executes it again with the same idempotency key. Only the holder of the lease can report
the result of the step.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from corral import clock
from corral.database.engine import Database
from corral.database.unit import SYSTEM, UnitContext, after_commit
from corral.errors import ExpectedFailure, Unavailable
from corral.ids import new_id
from corral.redact.redactor import Redactor, redacting_machine_text
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.secrets.api import Secrets
from corral_plugins.workflows.api import StepFailure, StepResult, StepType
from corral_plugins.workflows.models import StepRun, fetch_tuples
from corral_plugins.workflows.service.engine import Engine, StepStarter, failure_report, report_of
from corral_plugins.workflows.service.graph import Graph, Step
from corral_plugins.workflows.service.large_outputs import OUTPUT_LIMIT, LargeOutputs
from corral_plugins.workflows.service.rendering import Rendering
from corral_plugins.workflows.service.run_state import RunState, StepRow, update_row
from corral_plugins.workflows.service.step_scheduling import LEASE_SECONDS
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.service.wakeups import claim_advance, wake

log = logging.getLogger("corral.workflows")
Json = dict[str, Any]
Loaded = tuple[RunState, Graph]
RENEW_SECONDS = 15.0
CONCURRENCY = 100
BATCH = 200
SMALL_OUTPUT = 4096
"""The maximum size in bytes of outputs that are redacted on the event loop.

For small outputs, switching to another thread would take longer than the redaction.
"""
STOP_SECONDS = 5.0
ENTRY = UnitContext(label="workflows: steps", actor=SYSTEM)


class LeaseLost(ExpectedFailure):
    """Raised to roll back the report about a step whose lease has ended."""


class StepExecutors:
    """Executes each step in an asyncio task. `run` renews the leases of the steps."""

    secrets: Secrets | None

    def __init__(
        self,
        database: Database,
        engine: Engine,
        starter: StepStarter,
        types: StepTypes,
        redactor: Redactor,
        outputs: LargeOutputs,
    ) -> None:
        self._database, self._work = database, database.work
        self._engine, self._types, self._redactor = engine, types, redactor
        self._outputs = outputs
        self._tasks: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._advances: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._is_stopping = False
        self._refused: list[str] = []
        starter.executors = self

    def start(self, run_id: str, row_id: str, lease: str, loaded: Loaded | None = None) -> None:
        """Execute a step. Called on the event loop once the lease of the step has been committed.

        `loaded` is the run in the state that the engine has just written.
        """
        if self._is_stopping:
            self._refused.append(lease)
            return
        work = self._execute(run_id, row_id, lease, loaded)
        task = asyncio.get_running_loop().create_task(work, name=f"step {row_id}")
        self._tasks[row_id] = (lease, task)
        task.add_done_callback(functools.partial(self._on_step_ended, row_id, lease))

    def abort(self, row_id: str) -> None:
        """Stop executing a step that was cancelled."""
        if row_id in self._tasks:
            self._tasks[row_id][1].cancel()

    async def run(self) -> None:
        """Renew the leases of the running steps until cancelled."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(Unavailable):
                await self._renew()

    async def stop(self) -> None:
        """Stop all steps and end their leases, so that another process can take over the steps immediately.

        Steps that end within `STOP_SECONDS` (5 seconds) are not interrupted.
        """
        self._is_stopping = True
        leases = [lease for lease, _ in self._tasks.values()]
        tasks = [*(task for _, task in self._tasks.values()), *self._advances]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        leases += self._refused
        if leases:
            ended = StepRun.update(lease_until=clock.FIRST).where(StepRun.lease.in_(leases))
            await self._work(ended.execute, entry=ENTRY)

    async def take_over(self) -> None:
        """Execute the steps that dead processes were executing."""
        if not self._is_stopping and await self._database.read(_abandoned().exists, ENTRY):
            await self._work(self._claim_abandoned, entry=ENTRY)

    def _advance(self, run_id: str) -> None:
        """Advance a run in an asyncio task. If this fails, the sweep later queues a job that advances the run."""
        task = asyncio.get_running_loop().create_task(self._engine.advance(run_id), name=f"advance {run_id}")
        self._advances.add(task)
        task.add_done_callback(self._on_advance_ended)

    def _on_advance_ended(self, task: asyncio.Task[None]) -> None:
        self._advances.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error(
                "a workflow run could not be advanced", exc_info=task.exception(), extra={"task": task.get_name()}
            )

    # -- leases

    async def _renew(self) -> None:
        held = {lease: row_id for row_id, (lease, _) in self._tasks.items()}
        if not held:
            return

        def renew() -> set[str]:
            leases = [*held]
            StepRun.update(lease_until=clock.now(LEASE_SECONDS)).where(StepRun.lease.in_(leases)).execute()
            return {row[0] for row in fetch_tuples(StepRun.select(StepRun.lease).where(StepRun.lease.in_(leases)))}

        live = await self._work(renew, entry=ENTRY)
        for lease in held.keys() - live:
            self.abort(held[lease])

    def _claim_abandoned(self) -> None:
        for row_id, run_id, before in fetch_tuples(_abandoned().limit(BATCH)):
            lease = new_id()
            mine = {"lease": lease, "lease_until": clock.now(LEASE_SECONDS)}
            is_same = (StepRun.id == row_id) & (StepRun.lease == before) & (StepRun.lease_until < clock.now())
            if StepRun.update(mine).where(is_same).execute():
                after_commit(functools.partial(self.start, run_id, row_id, lease))

    def _on_step_ended(self, row_id: str, lease: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(row_id, ("", task))[0] == lease:
            self._tasks.pop(row_id, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("a step could not be executed", exc_info=task.exception(), extra={"step": row_id})

    # -- execution

    async def _execute(self, run_id: str, row_id: str, lease: str, loaded: Loaded | None) -> None:
        if self._slots.locked():
            loaded = None  # is too old when this step has a slot
        async with self._slots:
            found = loaded or await self._work(lambda: self._engine.load(run_id), entry=ENTRY, read=True)
            if found is None:
                return
            state, graph = found
            row = next((each for each in state.rows.values() if each.id == row_id), None)
            if row is None or row.lease != lease:
                return
            step, rendering = graph.steps[row.name], self._engine.rendering(state, graph)
            given, result = await self._call(state, step, row, rendering)
            output = result.pop("output", None)
            await self._store(run_id, row_id, lease, given, output, result)

    async def _call(self, state: RunState, step: Step, row: StepRow, rendering: Rendering) -> tuple[Any, Json]:
        """Call the step type. Return the input of the step, and the report on the result.

        References to secrets in the input are not replaced by values.
        """
        given: Any = None
        try:
            kind = self._kind(step)
            config = await rendering.render(step, tuple(row.iteration))
            given = config
            if faults := json_schema_errors(kind.schema, given):
                detail = "; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults[:5])
                raise StepFailure("invalid_configuration", f"The configuration is not valid: {detail}", retryable=False)
            context = await self._work(lambda: self._engine.context(state, step, row, config), entry=ENTRY, read=True)
            context = msgspec.structs.replace(context, with_secrets=self._with_secrets(state, step, row, rendering))
            async with asyncio.timeout(step.timeout_seconds):
                assert kind.execute is not None
                found = await kind.execute(context)
            return given, await self._report(state, row, found)
        except TimeoutError:
            message = f"The step took longer than {step.timeout_seconds} seconds."
            return given, failure_report(StepFailure("timeout", message, kind="timeout"))
        except ExpectedFailure as failure:
            return given, failure_report(failure)
        except Exception as error:
            log.exception("a step type raised an exception", extra={"step": step.name, "type": step.type})
            return given, failure_report(error)

    def _kind(self, step: Step) -> StepType:
        kind = self._types.find(step.type)
        if kind is None or kind.execute is None:
            detail = f"No active plugin provides the step type {step.type}."
            raise StepFailure("plugin_disabled", detail, retryable=False)
        return kind

    async def _report(self, state: RunState, row: StepRow, found: Any) -> Json:
        """Return the report on the result of a step, with secrets removed. A large output is stored as a file."""
        result = found if isinstance(found, StepResult) else StepResult(output=found)
        encoded = msgspec.json.encode(result.output)

        def redact() -> Any:
            with redacting_machine_text("workflow_run", state.run.id):
                return self._redactor.redact_json(msgspec.json.decode(encoded))

        output = redact() if len(encoded) <= SMALL_OUTPUT else await asyncio.to_thread(redact)
        if len(encoded) > OUTPUT_LIMIT:
            output = await self._outputs.store(state.run, row, output)
        return {**report_of(result), "output": output, "is_large": False}

    def _with_secrets(
        self, state: RunState, step: Step, row: StepRow, rendering: Rendering
    ) -> Callable[[str], Awaitable[Json]]:
        async def with_secrets(host: str) -> Json:
            names, vault = sorted(rendering.secret_names(step)), self.secrets
            if names and vault is None:
                raise StepFailure("plugin_disabled", "The plugin secrets is not active.", retryable=False)
            consumer, values = f"workflow:{state.run.workflow_id}", {}
            if names and vault is not None:
                values = await self._work(
                    lambda: {name: vault.use_value(name, consumer, host) for name in names}, entry=ENTRY, read=True
                )
            return await rendering.render(step, tuple(row.iteration), values)

        return with_secrets

    async def _store(self, run_id: str, row_id: str, lease: str, given: Any, output: Any, report: Json) -> None:
        """Store the report about a step, unless the step's lease has ended. Retry while the database is unavailable.

        The run is then advanced directly, unless a job that advances it is already queued. Another job would take three
        more transactions.
        """

        def store() -> None:
            if self._is_stopping:
                wake(run_id)
            elif claim_advance(run_id):
                after_commit(functools.partial(self._advance, run_id))
            changes = {"input": given, "output": output, "report": report, "lease": None, "lease_until": None}
            if not update_row(StepRun, changes, {"id": row_id, "lease": lease}):
                raise LeaseLost

        while True:
            try:
                with contextlib.suppress(LeaseLost):
                    await self._work(store, entry=ENTRY)
                return
            except Unavailable:
                await asyncio.sleep(1.0)


def _abandoned() -> Any:
    """Return a query for the steps whose processes have died."""
    is_abandoned = StepRun.lease.is_null(False) & (StepRun.lease_until < clock.now())
    return StepRun.select(StepRun.id, StepRun.run_id, StepRun.lease).where(is_abandoned)
