"""One lease: start, the process that works under it, the lease's clock, and what is reported at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Mapping
from typing import Any

from corral_plugins.workers.node.client import ApiError, Client, Unreachable
from corral_plugins.workers.node.endings import CANCELLED, LOST, REPORTED
from corral_plugins.workers.node.runner import Child, NoProcess, Runner

log = logging.getLogger("corral.worker")

REPORT_TRIES = 5


class Lease:
    """`deadline` is on the monotonic clock, measured from when the request that renewed it was *sent*.

    A call that fails changes nothing: the work goes on until this copy of the lease ends, then it stops and reports
    nothing.
    """

    def __init__(self, client: Client, claim: Mapping[str, Any], *, sent: float, seconds: float) -> None:
        self._client, self._claim, self.seconds = client, claim, seconds
        self.task_id: str = claim["task"]["id"]
        self.lease_id: str = claim["lease_id"]
        self.deadline = sent + seconds
        self._changed = asyncio.Event()
        self._lost = self._cancelled = False
        self._drain_until: float | None = None
        self._child: Child | None = None

    # -- what the server or the operator says

    def renew(self, sent: float, seconds: float | None = None) -> None:
        """The server renewed it, for `seconds` if it said so, in answer to a request sent at `sent`."""
        if seconds is None:
            self.deadline = max(self.deadline, sent + self.seconds)
        else:  # leases may have become shorter
            self.seconds, self.deadline = seconds, sent + seconds

    def hear(self, state: str) -> None:
        """A state of the protocol: ok | lost | cancel_requested | budget_warning."""
        if state == "budget_warning" and self._child is not None:
            self._child.tell("budget")
        elif state in ("lost", "cancel_requested"):
            self._lost |= state == "lost"
            self._cancelled |= state == "cancel_requested"
            self._changed.set()

    def drain(self, seconds: float) -> None:
        """Finish the current model call, keep a checkpoint and give the task back, within `seconds`."""
        self._drain_until = time.monotonic() + seconds
        if self._child is not None:
            self._child.tell("drain")
        self._changed.set()

    # -- the life of the lease

    async def run(self, runner: Runner) -> None:
        """From the claim to the report. What goes wrong ends this lease only; but `NoProcess`: nothing runs here."""
        try:
            sent = time.monotonic()
            started = await self._client.start(self.task_id, self.lease_id)
            self.renew(sent)
        except (ApiError, Unreachable) as error:
            log.warning("task %s was not started: %s", self.task_id, error)
            return
        if started.get("status") == "cancelling":
            await self._acknowledge()
            return
        try:
            self._child = child = await runner.start(self._claim)
        except NoProcess as error:
            await self._release(str(error))
            raise
        log.info("task %s: attempt %s begins", self.task_id, self._claim.get("attempt"))
        if self._drain_until is not None:
            child.tell("drain")
        try:
            await self._watch(child)
        finally:
            child.kill()

    async def _watch(self, child: Child) -> None:
        exited: asyncio.Future[Any] = asyncio.ensure_future(child.exited.wait())
        try:
            while True:
                self._changed.clear()
                if child.status is not None:
                    return await self._exited(child.status)
                if self._lost or time.monotonic() >= self.deadline:
                    log.warning("task %s: the lease is lost; its work is discarded", self.task_id)
                    return None
                if self._cancelled:
                    await child.end()
                    return await self._acknowledge()
                if self._drain_until is not None and time.monotonic() >= self._drain_until:
                    child.kill()
                    return await self._release("the worker stops")
                await self._until(exited)
        finally:
            exited.cancel()

    async def _until(self, exited: asyncio.Future[Any]) -> None:
        """Until the process ends, something changes, or a clock runs out."""
        changed: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
        ends = min(self.deadline, self._drain_until or self.deadline)
        try:
            timeout = max(0.0, ends - time.monotonic())
            await asyncio.wait({exited, changed}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _exited(self, status: int) -> None:
        """Report what the process did not report itself."""
        if status == REPORTED:
            log.info("task %s: the attempt has ended", self.task_id)
        elif status == LOST or self._lost:
            log.warning("task %s: the lease is lost; its work is discarded", self.task_id)
        elif status == CANCELLED or self._cancelled:
            await self._acknowledge()
        elif self._drain_until is not None:  # whoever stops the worker may stop its processes too
            await self._release("the worker stops")
        else:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            log.error("task %s: its process ended by %s", self.task_id, how)
            message = f"The process of the attempt ended by {how}."
            await self._report(
                self._client.fail(
                    self.task_id, "worker_crash", message, retryable=True, lease=self.lease_id, tries=REPORT_TRIES
                )
            )

    async def _acknowledge(self) -> None:
        log.info("task %s: cancelled", self.task_id)
        await self._report(self._client.cancelled(self.task_id, self.lease_id))

    async def _release(self, reason: str) -> None:
        log.info("task %s: given back", self.task_id)
        await self._report(self._client.release(self.task_id, reason, lease=self.lease_id, tries=REPORT_TRIES))

    async def _report(self, call: Any) -> None:
        """Only while this copy of the lease lives; afterwards the server knows without us."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                try:
                    await call
                except (ApiError, Unreachable) as error:
                    log.warning("task %s: the report was not taken: %s", self.task_id, error)
