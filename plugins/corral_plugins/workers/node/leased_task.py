"""Runs a claimed task until its lease ends: starts the process, watches the deadline, and sends the final report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Mapping
from typing import Any

from corral_plugins.workers.node.client import ApiError, ServerUnreachable, WorkerApiClient
from corral_plugins.workers.node.task_process import (
    CANCELLED,
    LOST,
    REPORTED,
    ProcessNotStarted,
    TaskProcess,
    TaskProcesses,
)

log = logging.getLogger("corral.worker")

REPORT_TRIES = 5


class TaskLease:
    """A claimed task with its lease.

    `deadline` is the monotonic time at which the lease expires. The duration of the lease is counted from the time at
    which the claim or the renewal was *sent*. Failed calls do not change the deadline. At the deadline, the process is
    killed and no report is sent.
    """

    def __init__(self, client: WorkerApiClient, claim: Mapping[str, Any], *, sent: float, seconds: float) -> None:
        self._client, self._claim, self.seconds = client, claim, seconds
        self.task_id: str = claim["task"]["id"]
        self.lease_id: str = claim["lease_id"]
        self.deadline = sent + seconds
        self._changed = asyncio.Event()
        self._lost = self._cancelled = False
        self._drain_until: float | None = None
        self._process: TaskProcess | None = None
        self._attempt: int | None = None
        self._began = 0.0

    # -- requests from the server and the operator

    def record_renewal(self, sent: float, seconds: float | None = None) -> None:
        """Set the new deadline after a request that renewed the lease.

        `sent` is the monotonic time at which the request was sent. `seconds` is the new duration of the lease, or None
        if the response does not contain one.
        """
        if seconds is None:
            self.deadline = max(self.deadline, sent + self.seconds)
        else:  # the duration may be shorter than before
            self.seconds, self.deadline = seconds, sent + seconds

    def apply_state(self, state: str, reason: str | None = None) -> None:
        """Apply the lease state from a response: `ok`, `lost`, `cancel_requested` or `budget_warning`.

        If a lost lease has a `reason`, the task's own process ended the lease with a report and is about to exit. The
        state is then ignored.
        """
        if state == "lost" and reason is not None:
            return
        if state == "budget_warning" and self._process is not None:
            self._process.send_control("budget")
        elif state in ("lost", "cancel_requested"):
            self._lost |= state == "lost"
            self._cancelled |= state == "cancel_requested"
            self._changed.set()

    def drain_process(self, seconds: float) -> None:
        """Ask the process to finish its model call, store a checkpoint and release the task.

        After `seconds`, the process is killed and the worker releases the task.
        """
        self._drain_until = time.monotonic() + seconds
        if self._process is not None:
            self._process.send_control("drain")
        self._changed.set()

    # -- running

    async def run_task(self, processes: TaskProcesses) -> None:
        """Run the task and report its outcome.

        Raise `ProcessNotStarted` if no process can be started. Other failures end only this lease.
        """
        try:
            sent = time.monotonic()
            started = await self._client.start_task(self.task_id, self.lease_id)
            self.record_renewal(sent)
        except (ApiError, ServerUnreachable) as error:
            log.warning("task %s could not be started: %s", self.task_id, error)
            return
        if started.get("status") == "cancelling":
            await self._acknowledge_cancel()
            return
        try:
            self._process = process = await processes.start_process(self._claim)
        except ProcessNotStarted as error:
            await self._release_task(str(error))
            raise
        self._attempt, self._began = started.get("attempt"), time.monotonic()
        log.info("task %s: attempt %s started", self.task_id, self._attempt)
        if self._drain_until is not None:
            process.send_control("drain")
        try:
            await self._watch_process(process)
        finally:
            process.kill_group()

    async def _watch_process(self, process: TaskProcess) -> None:
        exited: asyncio.Future[Any] = asyncio.ensure_future(process.exited.wait())
        try:
            while True:
                self._changed.clear()
                if process.status is not None:
                    return await self._report_exit(process.status)
                if self._lost or time.monotonic() >= self.deadline:
                    log.warning("task %s: the lease was lost; the work is discarded", self.task_id)
                    return None
                if self._cancelled:
                    await process.terminate_process()
                    return await self._acknowledge_cancel()
                if self._drain_until is not None and time.monotonic() >= self._drain_until:
                    process.kill_group()
                    return await self._release_task("the worker is stopping")
                await self._wait_for_change(exited)
        finally:
            exited.cancel()

    async def _wait_for_change(self, exited: asyncio.Future[Any]) -> None:
        """Wait until the process exits, the lease's state changes, or the deadline or the time for draining passes."""
        changed: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
        ends = min(self.deadline, self._drain_until or self.deadline)
        try:
            timeout = max(0.0, ends - time.monotonic())
            await asyncio.wait({exited, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _report_exit(self, status: int) -> None:
        """Report the exit of the process, unless the process has already reported the outcome itself."""
        if status == REPORTED:
            verb, _, why = (self._process.outcome if self._process else "").partition(": ")
            took = f"{time.monotonic() - self._began:.1f} s"
            told = f"{verb or 'ended'} after {took}{f': {why}' if why else ''}"
            log.info("task %s: attempt %s %s", self.task_id, self._attempt, told)
        elif status == LOST or self._lost:  # the answer to a report that was accepted may have been lost as well
            log.warning("task %s: the lease has ended; results that were not reported are discarded", self.task_id)
        elif status == CANCELLED or self._cancelled:
            await self._acknowledge_cancel()
        elif self._drain_until is not None:  # the signal that stops the worker may also reach its processes
            await self._release_task("the worker is stopping")
        else:
            cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            log.error("task %s: the process ended with %s", self.task_id, cause)
            message = f"The process of the attempt ended with {cause}."
            await self._send_report(
                self._client.fail_task(
                    self.task_id, "worker_crash", message, retryable=True, lease=self.lease_id, tries=REPORT_TRIES
                )
            )

    async def _acknowledge_cancel(self) -> None:
        log.info("task %s: cancelled", self.task_id)
        await self._send_report(self._client.acknowledge_cancel(self.task_id, self.lease_id))

    async def _release_task(self, reason: str) -> None:
        log.info("task %s: released (%s)", self.task_id, reason)
        await self._send_report(
            self._client.release_task(self.task_id, reason, lease=self.lease_id, tries=REPORT_TRIES)
        )

    async def _send_report(self, call: Any) -> None:
        """Send a report. Retries stop at the deadline, because the server then ends the lease anyway."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                try:
                    await call
                except (ApiError, ServerUnreachable) as error:
                    log.warning("task %s: the server rejected the report: %s", self.task_id, error)
