"""One lease: its start, its process, its deadline, and the report at its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Mapping
from typing import Any

from corral_plugins.workers.node.client import ApiError, Client, Unreachable
from corral_plugins.workers.node.task_process import CANCELLED, LOST, REPORTED, NoProcess, TaskProcess, TaskProcesses

log = logging.getLogger("corral.worker")

REPORT_TRIES = 5


class Lease:
    """A claimed task. `deadline` is monotonic, and counted from when the request that renewed the lease was *sent*.

    Failed calls change nothing: the process runs until the deadline; then it is killed and nothing is reported.
    """

    def __init__(self, client: Client, claim: Mapping[str, Any], *, sent: float, seconds: float) -> None:
        self._client, self._claim, self.seconds = client, claim, seconds
        self.task_id: str = claim["task"]["id"]
        self.lease_id: str = claim["lease_id"]
        self.deadline = sent + seconds
        self._changed = asyncio.Event()
        self._lost = self._cancelled = False
        self._drain_until: float | None = None
        self._process: TaskProcess | None = None

    # -- requests of the server and the operator

    def renew(self, sent: float, seconds: float | None = None) -> None:
        """Renew the lease by the reply to a request sent at `sent`. `seconds`: its new duration, if the reply says."""
        if seconds is None:
            self.deadline = max(self.deadline, sent + self.seconds)
        else:  # the setting may have become shorter
            self.seconds, self.deadline = seconds, sent + seconds

    def apply(self, state: str) -> None:
        """Act on a state of the protocol: ok | lost | cancel_requested | budget_warning."""
        if state == "budget_warning" and self._process is not None:
            self._process.send("budget")
        elif state in ("lost", "cancel_requested"):
            self._lost |= state == "lost"
            self._cancelled |= state == "cancel_requested"
            self._changed.set()

    def drain(self, seconds: float) -> None:
        """Let the process finish its model call, store a checkpoint and release the task, within `seconds`."""
        self._drain_until = time.monotonic() + seconds
        if self._process is not None:
            self._process.send("drain")
        self._changed.set()

    # -- running

    async def run(self, processes: TaskProcesses) -> None:
        """Run the task and report how it ended. Only `NoProcess` is raised; other failures end this lease alone."""
        try:
            sent = time.monotonic()
            started = await self._client.start(self.task_id, self.lease_id)
            self.renew(sent)
        except (ApiError, Unreachable) as error:
            log.warning("task %s could not be started: %s", self.task_id, error)
            return
        if started.get("status") == "cancelling":
            await self._acknowledge()
            return
        try:
            self._process = process = await processes.start(self._claim)
        except NoProcess as error:
            await self._release(str(error))
            raise
        log.info("task %s: attempt %s started", self.task_id, self._claim.get("attempt"))
        if self._drain_until is not None:
            process.send("drain")
        try:
            await self._watch(process)
        finally:
            process.kill()

    async def _watch(self, process: TaskProcess) -> None:
        exited: asyncio.Future[Any] = asyncio.ensure_future(process.exited.wait())
        try:
            while True:
                self._changed.clear()
                if process.status is not None:
                    return await self._exited(process.status)
                if self._lost or time.monotonic() >= self.deadline:
                    log.warning("task %s: the lease is lost; the work is discarded", self.task_id)
                    return None
                if self._cancelled:
                    await process.terminate()
                    return await self._acknowledge()
                if self._drain_until is not None and time.monotonic() >= self._drain_until:
                    process.kill()
                    return await self._release("the worker is stopping")
                await self._wait(exited)
        finally:
            exited.cancel()

    async def _wait(self, exited: asyncio.Future[Any]) -> None:
        """Wait until the process exits, something changes, or the deadline passes."""
        changed: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
        ends = min(self.deadline, self._drain_until or self.deadline)
        try:
            timeout = max(0.0, ends - time.monotonic())
            await asyncio.wait({exited, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _exited(self, status: int) -> None:
        """Report the end of the process, unless the process has done so."""
        if status == REPORTED:
            log.info("task %s: the attempt has ended", self.task_id)
        elif status == LOST or self._lost:
            log.warning("task %s: the lease is lost; the work is discarded", self.task_id)
        elif status == CANCELLED or self._cancelled:
            await self._acknowledge()
        elif self._drain_until is not None:  # the signal that stops the worker may reach its processes as well
            await self._release("the worker is stopping")
        else:
            cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            log.error("task %s: the process ended with %s", self.task_id, cause)
            message = f"The process of the attempt ended with {cause}."
            await self._report(
                self._client.fail(
                    self.task_id, "worker_crash", message, retryable=True, lease=self.lease_id, tries=REPORT_TRIES
                )
            )

    async def _acknowledge(self) -> None:
        log.info("task %s: cancelled", self.task_id)
        await self._report(self._client.cancelled(self.task_id, self.lease_id))

    async def _release(self, reason: str) -> None:
        log.info("task %s: released (%s)", self.task_id, reason)
        await self._report(self._client.release(self.task_id, reason, lease=self.lease_id, tries=REPORT_TRIES))

    async def _report(self, call: Any) -> None:
        """Send a report, until the deadline at most; after that the server has ended the lease by itself."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                try:
                    await call
                except (ApiError, Unreachable) as error:
                    log.warning("task %s: the report was refused: %s", self.task_id, error)
