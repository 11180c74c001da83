"""The engine, which advances runs.

To advance a run, the engine reads the rows of the run in one unit of work, evaluates expressions outside units of work,
and writes the changes in another unit of work. If the run was changed in the meantime, the engine starts again. A
process may therefore die at any moment: its unwritten changes have no effect, and another process computes them again.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.database.dialect import advisory_lock, savepoint
from corral.database.engine import Work
from corral.database.unit import SYSTEM, UnitContext, after_commit
from corral.errors import ExpectedFailure, Problem, Unavailable
from corral.events import log as event_log
from corral.events.event import Event, emit
from corral.jobs.job import enqueue
from corral.plugin import Settings
from corral_core.accounts.api import Accounts, InsufficientRights
from corral_core.expressions.api import Expressions
from corral_plugins.workflows import api
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepType, StepWait
from corral_plugins.workflows.models import Run, StepRun, WorkflowVersion
from corral_plugins.workflows.service.graph import Graph, Step, build_graph
from corral_plugins.workflows.service.large_outputs import LargeOutputs, is_too_large
from corral_plugins.workflows.service.metrics import WorkflowMetrics
from corral_plugins.workflows.service.planner import Planner
from corral_plugins.workflows.service.rendering import Rendering
from corral_plugins.workflows.service.run_state import (
    FINAL,
    FINAL_RUN,
    RunState,
    StepRow,
    claim_revision,
    load_state,
    write_rows,
)
from corral_plugins.workflows.service.step_changes import Plan
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.service.wakeups import JOB, LOST_SECONDS, wake_queued_runs
from corral_plugins.workflows.settings import MAX_ACTIVE_RUNS, MAX_PARALLEL, RUN_TIMEOUT_SECONDS

log = logging.getLogger("corral.workflows")
Json = dict[str, Any]
LOOK_AGAIN_SECONDS = 30.0
SUMMARY_BYTES = 1024
ROUNDS = 1000
GRAPHS = 500
TIMER_SECONDS = 3600.0
"""A timer that ends within this time gets its own job. The sweep handles timers that end later."""
ACTIVE = ("running", "waiting", "paused")
RUN_EVENTS: dict[str, type[api.RunEvent]] = {
    "running": api.RunStarted,
    "waiting": api.RunWaiting,
    "paused": api.RunPaused,
    "completed": api.RunCompleted,
    "failed": api.RunFailed,
    "cancelled": api.RunCancelled,
}
STEP_EVENTS: dict[str, type[api.StepEvent]] = {
    "started": api.StepStarted,
    "waiting": api.StepWaiting,
    "completed": api.StepCompleted,
    "failed": api.StepFailed,
    "skipped": api.StepSkipped,
}


class GraphCache:
    """Reads definitions and caches their graphs. A definition never changes, so a cached graph never becomes stale."""

    def __init__(self, types: StepTypes) -> None:
        self._types = types
        self._graphs: dict[tuple[str, int], Graph] = {}

    def read(self, workflow_id: str, n: int) -> Graph:
        """Return the graph of a version of a workflow. Runs in a unit of work."""
        found = self._graphs.get((workflow_id, n))
        if found is None:
            version = WorkflowVersion.get((WorkflowVersion.workflow_id == workflow_id) & (WorkflowVersion.n == n))
            found = build_graph(version.steps, version.config, self._types.gotos)
            if len(self._graphs) >= GRAPHS:
                self._graphs.clear()
            self._graphs[(workflow_id, n)] = found
        return found


class LocalStepExecutor(Protocol):
    """Executes steps in this process. The methods are called on the event loop."""

    def start(self, run_id: str, row_id: str, lease: str, loaded: tuple[RunState, Graph] | None = None) -> None:
        """Start executing a step under a lease. `loaded` is the run in the state that the engine has just written."""
        ...

    def abort(self, row_id: str) -> None:
        """Stop executing a step. The method does nothing if this process is not executing the step."""
        ...


class StepStarter:
    """Starts and stops the steps that this process executes. `StepExecutors` registers itself here."""

    def __init__(self) -> None:
        self.executors: LocalStepExecutor | None = None

    def start(self, run_id: str, row_id: str, lease: str, loaded: tuple[RunState, Graph]) -> None:
        """Start executing a step under a lease. `loaded` is the run in the state that the engine has just written."""
        if self.executors is not None:
            self.executors.start(run_id, row_id, lease, loaded)

    def abort(self, row_id: str) -> None:
        """Stop executing a step."""
        if self.executors is not None:
            self.executors.abort(row_id)


class Engine:
    """Advances runs."""

    def __init__(
        self,
        work: Work,
        settings: Settings,
        types: StepTypes,
        graphs: GraphCache,
        expressions: Expressions,
        accounts: Accounts,
        permissions: Permissions,
        starter: StepStarter,
        metrics: WorkflowMetrics,
        outputs: LargeOutputs,
    ) -> None:
        self._work, self._settings, self._types, self._graphs = work, settings, types, graphs
        self._expressions, self._starter, self._metrics, self._outputs = expressions, starter, metrics, outputs
        self._accounts, self._permissions = accounts, permissions

    async def advance(self, run_id: str) -> None:
        """Advance a run as far as currently possible."""
        for _ in range(ROUNDS):
            found = await self._work(lambda: self._load(run_id), read=True)
            if found is None:
                return
            state, graph = found
            if state.run.status == "queued" and state.run.stop is None:
                if not await self._work(functools.partial(self._admit, state)):
                    return
                continue
            try:
                plan = await self._plan(state, graph)
            except Unavailable:
                raise
            except Exception:  # would fail again, and count against the plugin each time
                log.exception("a workflow run could not be advanced", extra={"run": run_id})
                await self._work(functools.partial(self._give_up, state))
                return
            entry = UnitContext(label="workflows: advance", actor=SYSTEM, cause=tuple(state.run.cause))
            is_written = await self._work(functools.partial(self._apply, state, plan), entry=entry)
            if not is_written:
                await self._outputs.remove(plan.stored)
            elif not plan.is_partial:
                return

    def rendering(self, state: RunState, graph: Graph) -> Rendering:
        """Return an object that evaluates the expressions of a run."""
        return Rendering(self._expressions, self._work, state, graph)

    def load(self, run_id: str) -> tuple[RunState, Graph] | None:
        """Return the state and the graph of a run, or None if the run does not exist or has ended.

        Runs in a unit of work.
        """
        state = load_state(run_id)
        if state is None or state.run.status in FINAL_RUN:
            return None
        return state, self._graphs.read(state.run.workflow_id, state.run.n)

    def context(
        self, state: RunState, step: Step, row: StepRow, config: Json, *, waits_for: str | None = None
    ) -> StepContext:
        """Return the data about a step that its step type receives. Runs in a unit of work.

        Raise `InsufficientRights` if the step is about to start its work but the person who started the run is no
        longer active.
        """
        run, settings = state.run, self._graphs.read(state.run.workflow_id, state.run.n).config
        limit = settings.get("max_cost_usd")
        iteration = ".".join(map(str, row.iteration))
        return StepContext(
            run_id=run.id,
            workflow_id=run.workflow_id,
            step_run_id=row.id,
            name=row.name,
            title=step.title,
            iteration=tuple(row.iteration),
            attempt=row.attempt,
            idempotency_key=f"{run.id}:{row.name}:{iteration}",
            config=config,
            agent_id=step.agent_id,
            retry_policy=step.retry_policy,
            timeout_seconds=step.timeout_seconds,
            depth=run.depth,
            caller=self._caller_of(run, may_be_inactive=waits_for is not None),
            tainted=run.tainted,
            cause_chain=tuple(run.cause),
            remaining_usd=None if limit is None else max(0.0, limit - run.cost_micro / 1e6),
            work=self._work,
            review_policy=settings.get("review_policy"),
            waits_for=waits_for,
        )

    def _caller_of(self, run: Run, *, may_be_inactive: bool) -> Principal:
        """Return the principal whose rights the steps of a run have.

        If the person who started the run is no longer active, raise `InsufficientRights`. With `may_be_inactive`,
        return a principal without rights instead, so that work started for this person can still be ended.
        """
        if run.started_by is None:
            return Principal(kind="system", id="system", role="admin", permissions=self._permissions.held_by("admin"))
        try:
            return self._accounts.principal_of(run.started_by)
        except InsufficientRights:
            if not may_be_inactive:
                raise
            return Principal(kind="user", id=run.started_by, user_id=run.started_by)

    # -- one advance

    def _load(self, run_id: str) -> tuple[RunState, Graph] | None:
        found = self.load(run_id)
        if found is not None and found[0].run.queued_at:
            self._metrics.observe_lag(found[0].run.queued_at)
        return found

    def _admit(self, state: RunState) -> bool:
        """Start a queued run if the limits on active runs allow it.

        Return whether the caller should continue with the run.
        """
        run = state.run
        advisory_lock("workflows.admit")
        config = self._graphs.read(run.workflow_id, run.n).config
        limit = (config.get("concurrency") or {}).get("limit")
        queued = (Run.workflow_id == run.workflow_id) & (Run.status == "queued") & (Run.id < run.id)
        is_full = limit is not None and (
            active_runs(run.workflow_id, limit) >= limit or Run.select().where(queued).exists()
        )
        most = self._settings.get(MAX_ACTIVE_RUNS)
        if is_full or active_runs(None, most) >= most:
            # The end of a run of the same workflow wakes this one. For the limit on all runs, the sweep looks again.
            state.set(queued_at="", due_at=clock.LAST if is_full else clock.now(LOOK_AGAIN_SECONDS))
            return not claim_revision(state)
        seconds = config.get("timeout_seconds") or self._settings.get(RUN_TIMEOUT_SECONDS)
        state.set(status="running", started_at=clock.now(), deadline_at=clock.now(seconds))
        if claim_revision(state):
            self._emit_run(run, api.RunStarted)
        return True

    def _give_up(self, state: RunState) -> None:
        """End a run that cannot be advanced because of an error in Corral or in a plugin."""
        error = {
            "step": "",
            "kind": "error",
            "type": "internal",
            "message": "The run failed with an internal error; see the log.",
        }
        state.changes.clear()
        state.set(status="failed", error=error, finished_at=clock.now(), queued_at="", due_at=clock.LAST)
        if claim_revision(state):
            is_open = (StepRun.run_id == state.run.id) & StepRun.status.not_in(FINAL)
            StepRun.update(status="cancelled", lease=None, finished_at=clock.now()).where(is_open).execute()
            self._on_status_change(state)

    async def _plan(self, state: RunState, graph: Graph) -> Plan:
        most = graph.config.get("max_parallel") or self._settings.get(MAX_PARALLEL)
        planner = Planner(state, graph, self._types, self.rendering(state, graph), self._outputs, max_parallel=most)
        return await planner.run()

    def _apply(self, state: RunState, plan: Plan) -> bool:
        """Write the changes that advance a run. Return False if the run has changed since it was read."""
        state.set(queued_at="")
        if not claim_revision(state):
            return False
        waiting: list[StepRow] = []
        ended = [self._dispatch(state, step, row, config, waiting) for step, row, config in plan.dispatched]
        ended += [self._cancel(state, step, row, waits_for) for step, row, waits_for in plan.cancelled]
        for row in state.rows.values():
            if row.event is not None and row.cursor is None:
                row.set(cursor=event_log.last_seq())
        write_rows(state)
        for name, row in [*plan.events, *(("waiting", row) for row in waiting)]:
            self._emit_step(state, name, row)
        if "status" in state.changes:
            self._on_status_change(state)
        plan.is_partial = plan.is_partial or any(ended) or bool(waiting)
        if plan.is_partial:
            again = {"queued_at": clock.now(), "due_at": clock.now(LOST_SECONDS)}
            Run.update(again).where(Run.id == state.run.id).execute()
        elif "due_at" in state.changes and state.run.due_at < clock.now(TIMER_SECONDS):
            delay = max(0.0, clock.parse_instant(state.run.due_at) - clock.time_s())
            enqueue(JOB, delay_seconds=delay, run_id=state.run.id)
        self._start_executors(state, plan)
        return True

    def _start_executors(self, state: RunState, plan: Plan) -> None:
        run, starter = state.run, self._starter
        loaded = state, self._graphs.read(run.workflow_id, run.n)
        for row in plan.executed:
            if row.lease is not None:
                after_commit(functools.partial(starter.start, run.id, row.id, row.lease, loaded))
        for row_id in plan.aborted:
            after_commit(functools.partial(starter.abort, row_id))

    # -- steps whose work is done elsewhere

    def _dispatch(self, state: RunState, step: Step, row: StepRow, config: Json, waiting: list[StepRow]) -> bool:
        """Dispatch a step. Return whether the step ended immediately, so that the run can advance further."""
        if not row.is_open:  # cancelled in the same advance
            return False
        row.set(report=None, waits_for=None)  # the unit of work may run again
        try:
            kind = self._kind(step)
            assert kind.dispatch is not None
            with savepoint():
                found = kind.dispatch(self.context(state, step, row, config))
        except peewee.DatabaseError:  # the unit of work runs again
            raise
        except Exception as error:
            log_unexpected(error, step)
            row.set(report=failure_report(error))
            return True
        if isinstance(found, StepResult):
            row.set(output=found.output, report=report_of(found))
            return True
        assert isinstance(found, StepWait)
        row.set(status=found.status, waits_for=found.waits_for, person=found.person)
        if found.until is not None:
            row.set(wake_at=found.until)
        if found.status == "waiting":
            waiting.append(row)
        return False

    def _cancel(self, state: RunState, step: Step, row: StepRow, waits_for: str) -> bool:
        """Cancel the work that is done elsewhere for a step. Return whether the step ended immediately."""
        reason = (state.run.stop or {}).get("message")
        try:
            kind = self._kind(step)
            assert kind.cancel is not None
            with savepoint():
                is_ended = kind.cancel(self.context(state, step, row, {}, waits_for=waits_for), reason)
        except peewee.DatabaseError:  # the unit of work runs again
            raise
        except Exception as error:  # it has ended already, or the plugin is out of service
            log_unexpected(error, step)
            is_ended = True
        if is_ended and row.is_open and row.reason == "cancelling":
            row.set(status="cancelled", finished_at=clock.now(), wake_at=None)
            return True
        return False

    def _kind(self, step: Step) -> StepType:
        kind = self._types.find(step.type)
        if kind is None:
            raise StepFailure("plugin_disabled", f"No active plugin provides the step type {step.type}.")
        return kind

    # -- events

    def _on_status_change(self, state: RunState) -> None:
        run = state.run
        self._emit_run(run, RUN_EVENTS[run.status])
        if run.status in FINAL_RUN:
            wake_queued_runs(run.workflow_id)

    def _emit_run(self, run: Run, kind: type[api.RunEvent]) -> None:
        more: Json = {}
        if kind is api.RunFailed:
            more |= {"error": run.error, "name": _workflow_name(run)}
        if kind is api.RunCancelled:
            more["reason"] = (run.stop or {}).get("message")
        emit_run_event(run, kind, **more)

    def _emit_step(self, state: RunState, name: str, row: StepRow) -> None:
        run = state.run
        if name in ("completed", "failed"):
            self._metrics.observe_step(row.type, row.started_at, row.finished_at)
        event = STEP_EVENTS[name](
            run_id=run.id,
            workflow_id=run.workflow_id,
            workflow_version=run.n,
            step=row.name,
            iteration=row.iteration,
            status={"started": "running"}.get(name, name),
            output_summary=summary_of(row.output) if name == "completed" else None,
            error=row.error if name == "failed" else None,
        )
        emit(event, object=("workflow_run", run.id), owner=run.started_by, cause=tuple(run.cause))


def emit_run_event(run: Run, kind: type[api.RunEvent], **more: Any) -> None:
    """Emit an event about a run."""
    event: Event = kind(
        run_id=run.id,
        workflow_id=run.workflow_id,
        workflow_version=run.n,
        status=run.status,
        trigger={"type": run.trigger_type, "id": run.trigger_id},
        **more,
    )
    emit(event, object=("workflow_run", run.id), owner=run.started_by, cause=tuple(run.cause))


def _workflow_name(run: Run) -> str:
    same = (WorkflowVersion.workflow_id == run.workflow_id) & (WorkflowVersion.n == run.n)
    return str(WorkflowVersion.select(WorkflowVersion.name).where(same).scalar())


def summary_of(output: Any) -> str | None:
    """Return at most the first 1 KiB of a step's output, for use in events, or None if there is no output.

    Output that is not text is encoded as JSON.
    """
    if output is None or output is UNSET:
        return None
    text = output["text"] if isinstance(output, dict) and isinstance(output.get("text"), str) else output
    data = text.encode() if isinstance(text, str) else msgspec.json.encode(text)
    return data[:SUMMARY_BYTES].decode(errors="ignore")


def active_runs(workflow_id: str | None, limit: int) -> int:
    """Return the number of active runs of a workflow, or of all workflows. The number is capped at `limit`."""
    where = Run.status.in_(ACTIVE)
    if workflow_id is not None:
        where &= Run.workflow_id == workflow_id
    return int(Run.select(Run.id).where(where).limit(limit).count())


def report_of(result: StepResult) -> Json:
    """Return the stored form of a step's result.

    If `is_large` is set in the stored form, the output is stored as a file when the run is next advanced.
    """
    report: Json = {"status": result.status, "cost_micro": round(result.cost_usd * 1e6), "error": result.error}
    report |= {"retryable": result.retryable, "reason": result.reason and result.reason[:500], "goto": result.goto}
    return {**report, "tainted": result.tainted, "is_large": is_too_large(result.output)}


def log_unexpected(error: Exception, step: Step) -> None:
    """Log an exception raised by a step type, unless it is an expected failure."""
    if not isinstance(error, ExpectedFailure):
        log.error("a step type raised an exception", exc_info=error, extra={"step": step.name, "type": step.type})


def failure_report(failure: BaseException) -> Json:
    """Return the stored form of the exception that made a step fail."""
    if isinstance(failure, StepFailure):
        error = {"kind": failure.kind, "type": failure.type, "message": failure.message}
        return {"status": "failed", "error": error, "retryable": failure.retryable}
    if isinstance(failure, Problem):
        faults = "; ".join(f"{fault.pointer}: {fault.detail}" for fault in failure.errors[:5])
        error = {"kind": "error", "type": failure.code, "message": f"{failure.detail} {faults}".strip()}
        return {"status": "failed", "error": error, "retryable": failure.status >= 500 or failure.status == 429}
    error = {"kind": "error", "type": "internal", "message": "The step failed with an internal error; see the log."}
    return {"status": "failed", "error": error, "retryable": True}
