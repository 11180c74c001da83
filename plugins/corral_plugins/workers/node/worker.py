"""The reference worker.

The worker registers, claims tasks, renews their leases and receives signals. When it stops, it releases its tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from corral_plugins.workers.node import host_info
from corral_plugins.workers.node.client import ApiError, ServerUnreachable, WorkerApiClient, retry_delay
from corral_plugins.workers.node.identity import DuplicateWorkerDetector, WorkerFolder, WorkerIdentity
from corral_plugins.workers.node.leased_task import TaskLease
from corral_plugins.workers.node.task_process import ProcessNotStarted, TaskProcesses, TaskProcessSettings
from corral_plugins.workers.node.tools.builtin import tool_offers
from corral_plugins.workers.node.tools.mcp import WorkerMcp

log = logging.getLogger("corral.worker")

CLAIM_WAIT_SECONDS, SIGNAL_WAIT_SECONDS = 25, 50
NOT_APPROVED_SECONDS = 5.0
IDLE_SECONDS = {"none": 0.05, "at_capacity": 1.0, "draining": 15.0, "budget_exhausted": 10.0, "kill_switch": 10.0}
UNKNOWN_REASON_SECONDS = 5.0


class WorkerRefused(Exception):
    """Raised if the server permanently refuses the worker. Repeating the call would not help."""


class WorkerOptions(msgspec.Struct, kw_only=True):
    """The options of the `corral worker` command.

    `key` is a registration key or a member's token, used for registration. `allow` lists the tools that agents may use
    on this machine. `mcp` contains the MCP servers that the worker starts.
    """

    url: str
    name: str
    key: str | None
    labels: dict[str, str] = {}
    max_agents: int = 1
    drain_seconds: float = 30.0
    allow: tuple[str, ...] = ()
    mcp: WorkerMcp = WorkerMcp()


class ReferenceWorker:
    """The reference worker. It can be stopped at any time by calling `drain` on the event loop; `run` then returns."""

    def __init__(self, options: WorkerOptions, folder: WorkerFolder) -> None:
        self._options, self._folder = options, folder
        settings = TaskProcessSettings(
            url=options.url, allowed=options.allow, workspaces=str(folder.path / "workspaces"), mcp=options.mcp
        )
        self._processes = TaskProcesses(settings, folder.path)
        self._no_process: ProcessNotStarted | None = None
        self._offer: Mapping[str, Any] = {"tools": [*tool_offers(options.allow), *options.mcp.offers]}
        self._unsent_offer = self._offer  # sent with the first heartbeat: the options may have changed
        self._identity: WorkerIdentity
        self._client: WorkerApiClient
        self._leases: dict[str, TaskLease] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._draining = asyncio.Event()
        self._paused = False  # the server is draining this worker
        self._awaits_approval = False
        self._last_signal = 0
        self._registering, self._duplicates = asyncio.Lock(), DuplicateWorkerDetector()

    # -- running

    async def run(self) -> None:
        """Run until the worker is drained.

        Raise `WorkerRefused` if the server refuses the worker. Raise `ProcessNotStarted`, after releasing the tasks, if
        no process can be started.
        """
        warming = asyncio.create_task(self._processes.start_fork_server())
        draining = asyncio.create_task(self._draining.wait())
        working = asyncio.create_task(self._run_until_drained(warming))
        try:
            await asyncio.wait({working, draining}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (warming, draining, working):
                task.cancel()
            await asyncio.gather(warming, draining, working, return_exceptions=True)
            if hasattr(self, "_client"):
                await self._client.close()
        if self._no_process is not None:
            raise self._no_process

    def drain(self) -> None:
        """Stop claiming tasks and release the running tasks. `run` then returns."""
        if not self._draining.is_set():
            log.info("stopping: releasing %d tasks", len(self._leases))
            self._draining.set()

    def kill(self) -> None:
        """Kill the processes of all tasks. The leases of these tasks then expire."""
        self._processes.kill_all()

    async def _run_until_drained(self, warming: asyncio.Task[None]) -> None:
        await self._load_or_register()
        await warming
        renewing = [
            asyncio.create_task(self._repeat_step(step)) for step in (self._send_heartbeat, self._receive_signals)
        ]
        claiming = asyncio.create_task(self._repeat_step(self._claim_loop))
        try:
            await asyncio.wait({claiming, *renewing}, return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, *renewing):
                if task.done():
                    task.result()
        except asyncio.CancelledError:  # draining: leases are renewed until their processes have stopped
            claiming.cancel()
            await self._release_all()
            raise
        finally:
            for task in (claiming, *renewing):
                task.cancel()
            await asyncio.gather(claiming, *renewing, return_exceptions=True)

    async def _release_all(self) -> None:
        for lease in self._leases.values():
            lease.drain_process(self._options.drain_seconds)
        if self._running:
            await asyncio.wait(self._running, timeout=self._options.drain_seconds + 5)

    # -- identity

    async def _load_or_register(self) -> None:
        identity = self._folder.load_identity(self._options.url)
        await self._use_identity(identity or await self._register_worker())
        log.info("worker %s (%s) at %s", self._options.name, self._identity.worker_id, self._options.url)

    async def _register_worker(self) -> WorkerIdentity:
        """Register the worker.

        Retry until the server responds. Raise `WorkerRefused` if the server refuses the registration.
        """
        if self._options.key is None:
            raise WorkerRefused(
                "This worker is not registered; set a registration key with --token-file or CORRAL_WORKER_TOKEN."
            )
        facts = {
            "name": self._options.name,
            "max_agents": self._options.max_agents,
            "labels": self._options.labels,
            "fingerprint": self._folder.fingerprint(),
            **host_info.host_facts(),
            **self._offer,
        }
        client = WorkerApiClient(self._options.url, self._options.key)
        tries = 0
        try:
            while True:
                try:
                    return self._store_identity(await client.register_worker(facts))
                except (ServerUnreachable, ApiError) as error:
                    if isinstance(error, ApiError) and (
                        not error.is_temporary or (error.is_foreign and error.status < 500)
                    ):
                        raise WorkerRefused(_registration_refusal(error)) from None
                    tries += 1
                    if tries == 1:
                        log.warning("waiting for the server: %s", error)
                    await asyncio.sleep(retry_delay(tries, error))
        finally:
            await client.close()

    def _store_identity(self, registered: Mapping[str, Any]) -> WorkerIdentity:
        if "token" not in registered:
            raise ApiError(200, {})
        identity = WorkerIdentity(
            url=self._options.url,
            worker_id=registered["id"],
            token=registered["token"],
            heartbeat_seconds=int(registered.get("heartbeat_seconds") or 15),
            lease_seconds=int(registered.get("lease_seconds") or 60),
        )
        self._folder.store_identity(identity)
        return identity

    async def _use_identity(self, identity: WorkerIdentity) -> None:
        previous = getattr(self, "_client", None)
        self._identity = identity
        self._client = WorkerApiClient(self._options.url, identity.token)
        if previous is not None:
            await previous.close()

    async def _register_again(self, refused: WorkerIdentity) -> None:
        """Register again after the server refused the token. Concurrent callers share one registration."""
        async with self._registering:
            if self._identity is refused:
                if self._duplicates.record_revoked_token():
                    raise WorkerRefused(
                        "Another worker with the same name and fingerprint is registering. It may use a copy of this "
                        "worker's folder (--dir); give each worker its own folder."
                    )
                log.warning("the server revoked this worker's token; registering again")
                await self._use_identity(await self._register_worker())

    # -- claims

    async def _claim_loop(self, identity: WorkerIdentity) -> None:
        free = self._options.max_agents - len(self._leases)
        if free <= 0 or self._paused:
            await self._wait_for_slot()
            return
        reply = await self._client.claim_tasks(
            identity.worker_id, max_tasks=min(free, 50), wait_seconds=CLAIM_WAIT_SECONDS
        )
        self._awaits_approval = False
        for claim in reply.get("tasks") or ():
            self._start_lease(claim)
        if not reply.get("tasks"):
            await asyncio.sleep(IDLE_SECONDS.get(str(reply.get("reason")), UNKNOWN_REASON_SECONDS))

    def _start_lease(self, claim: Mapping[str, Any]) -> None:
        lease = TaskLease(self._client, claim, sent=time.monotonic(), seconds=self._identity.lease_seconds)
        self._leases[lease.lease_id] = lease
        task = asyncio.create_task(lease.run_task(self._processes))
        self._running.add(task)

        def ended(_: asyncio.Task[None]) -> None:
            self._running.discard(task)
            self._leases.pop(lease.lease_id, None)
            self._slot_freed.set()
            if not task.cancelled() and isinstance(error := task.exception(), ProcessNotStarted):
                self._no_process = error
                self.drain()

        task.add_done_callback(ended)

    async def _wait_for_slot(self) -> None:
        self._slot_freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0 if self._paused else None):
                await self._slot_freed.wait()

    # -- heartbeats and signals

    async def _send_heartbeat(self, identity: WorkerIdentity) -> None:
        sent = time.monotonic()
        leases = [{"task_id": lease.task_id, "lease_id": lease.lease_id} for lease in self._leases.values()]
        body = {**host_info.host_usage(str(self._folder.path)), "leases": leases, **self._unsent_offer}
        reply = await self._client.send_heartbeat(identity.worker_id, body)
        self._unsent_offer = {}
        self._apply_reply(reply, sent)
        requested = float(reply.get("next_heartbeat_seconds") or identity.heartbeat_seconds)
        shortest_lease = min([identity.lease_seconds, *(lease.seconds for lease in self._leases.values())])
        await asyncio.sleep(max(0.5, min(requested, shortest_lease / 3)))  # a task may make no calls in between

    async def _receive_signals(self, identity: WorkerIdentity) -> None:
        reply = await self._client.wait_for_signals(
            identity.worker_id, after=self._last_signal, wait=SIGNAL_WAIT_SECONDS
        )
        for signal in reply.get("signals") or ():
            self._last_signal = max(self._last_signal, int(signal["seq"]))
        self._apply_reply({"leases": reply.get("signals"), "commands": reply.get("commands")}, None)

    async def _repeat_step(self, step: Callable[[WorkerIdentity], Awaitable[None]]) -> None:
        """Call `step` repeatedly until cancelled, and recover from failed calls.

        Failed calls do not end the leases, which last until their deadlines.
        """
        tries = 0
        while True:
            identity = self._identity
            try:
                await step(identity)
                tries = 0
            except (ApiError, ServerUnreachable) as error:
                tries += 1
                await self._recover_from_error(error, identity, tries)

    async def _recover_from_error(
        self, error: ApiError | ServerUnreachable, identity: WorkerIdentity, tries: int
    ) -> None:
        """Wait after a failed call. Register again if the token was revoked or the worker was deleted."""
        code = error.code if isinstance(error, ApiError) else ""
        if code == "worker_not_approved":
            if not self._awaits_approval:
                name = shlex.quote(self._options.name)
                log.warning("waiting for an admin to approve this worker: corral workers approve %s", name)
            self._awaits_approval = True
            await asyncio.sleep(NOT_APPROVED_SECONDS)
            return
        if isinstance(error, ApiError) and not error.is_foreign and (error.status == 401 or code == "not_found"):
            await self._register_again(identity)
        elif tries == 10 or (tries == 1 and code != "shutting_down"):
            log.warning("%s", error)
        await asyncio.sleep(retry_delay(tries, error))

    def _apply_reply(self, reply: Mapping[str, Any], sent: float | None) -> None:
        """Apply the lease states, the commands and the worker status from a response.

        The worker status is also applied, in case an earlier response that contained a command was lost. `sent` is the
        monotonic time at which the request was sent, or None if the request did not renew leases.
        """
        for state in reply.get("leases") or ():
            lease = self._leases.get(state["lease_id"])
            if lease is not None:
                if sent is not None and state["state"] != "lost":
                    lease.record_renewal(sent, _lease_seconds(reply.get("server_time"), state.get("expires_at")))
                lease.apply_state(state["state"], state.get("reason"))
        for command in reply.get("commands") or ():
            if command in ("drain", "resume"):
                self._set_paused(command == "drain")
            elif command == "reregister":
                log.warning("an admin rotated this worker's token; restart the worker with a registration key")
        if "status" in reply:
            self._set_paused(reply["status"] == "draining")

    def _set_paused(self, is_paused: bool) -> None:
        if is_paused != self._paused:
            self._paused = is_paused
            self._slot_freed.set()


def _registration_refusal(error: ApiError) -> str:
    if error.status == 401 and not error.is_foreign:
        return (
            "The server does not accept the registration key: it is wrong, expired or used up. An admin creates "
            "another one with `corral api POST /admin/registration-keys -f name=NAME`."
        )
    return f"The server refused to register this worker: {error.detail}"


def _lease_seconds(server_time: str | None, expires_at: str | None) -> float | None:
    """Return how many seconds of a lease remain by the server's clock, or None if a time is missing."""
    if server_time is None or expires_at is None:
        return None
    return max(0.0, (datetime.fromisoformat(expires_at) - datetime.fromisoformat(server_time)).total_seconds())
