"""The worker: registers, claims, keeps leases alive, hears signals, and gives work back when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from corral_plugins.workers.node import machine
from corral_plugins.workers.node.client import ApiError, Client, Unreachable, pause
from corral_plugins.workers.node.identity import Folder, Identity, Losses
from corral_plugins.workers.node.lease import Lease
from corral_plugins.workers.node.process import Site
from corral_plugins.workers.node.runner import NoProcess, Runner
from corral_plugins.workers.node.tools.table import offers

log = logging.getLogger("corral.worker")

CLAIM_WAIT_SECONDS, SIGNAL_WAIT_SECONDS = 25, 50
NOT_APPROVED_SECONDS = 5.0
IDLE_REASONS = {"none": 0.05, "at_capacity": 1.0, "draining": 15.0, "budget_exhausted": 10.0, "kill_switch": 10.0}
UNKNOWN_REASON_SECONDS = 5.0


class Refused(Exception):
    """The server does not take this worker, and trying again will not help."""


class Options(msgspec.Struct, kw_only=True):
    """How the worker was started. `key`: a registration key or a member's token, used to register. `allow`: tools of
    this machine that agents may use.
    """

    url: str
    name: str
    key: str | None
    labels: dict[str, str] = {}
    max_agents: int = 1
    drain_seconds: float = 30.0
    allow: tuple[str, ...] = ()


class Node:
    """One worker process. `run` returns when it has been drained; `drain` may be called at any time, on the loop."""

    def __init__(self, options: Options, folder: Folder) -> None:
        self._options, self._folder = options, folder
        site = Site(url=options.url, allowed=options.allow, workspaces=str(folder.path / "workspaces"))
        self._runner = Runner(site, folder.path)
        self._broken: NoProcess | None = None
        self._offer = {"tools": offers(options.allow)}
        self._identity: Identity
        self._client: Client
        self._leases: dict[str, Lease] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._draining = asyncio.Event()
        self._paused = False  # the server drains this worker
        self._registering, self._losses = asyncio.Lock(), Losses()

    # -- life

    async def run(self) -> None:
        """Work until `drain`. Raises `Refused`, and `NoProcess` when it has given back what it had."""
        warming = asyncio.create_task(self._runner.warm())
        draining = asyncio.create_task(self._draining.wait())
        working = asyncio.create_task(self._work(warming))
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
        if self._broken is not None:
            raise self._broken

    def drain(self) -> None:
        """Claim nothing more, give running work back, end."""
        if not self._draining.is_set():
            log.info("stopping: %d tasks are given back", len(self._leases))
            self._draining.set()

    def kill(self) -> None:
        """End every task's process at once; their leases run out."""
        self._runner.kill_all()

    async def _work(self, warming: asyncio.Task[None]) -> None:
        await self._sign_on()
        await warming
        keeping = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self._signals())]
        claiming = asyncio.create_task(self._claims())
        try:
            await asyncio.wait({claiming, *keeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, *keeping):
                if task.done():
                    task.result()
        except asyncio.CancelledError:  # drained: leases are kept alive while their work ends
            claiming.cancel()
            await self._give_back()
            raise
        finally:
            for task in (claiming, *keeping):
                task.cancel()
            await asyncio.gather(claiming, *keeping, return_exceptions=True)

    async def _give_back(self) -> None:
        for lease in self._leases.values():
            lease.drain(self._options.drain_seconds)
        if self._running:
            await asyncio.wait(self._running, timeout=self._options.drain_seconds + 5)

    # -- identity

    async def _sign_on(self) -> None:
        identity = self._folder.load(self._options.url)
        await self._become(identity or await self._register())
        log.info("worker %s (%s) at %s", self._options.name, self._identity.worker_id, self._options.url)

    async def _register(self) -> Identity:
        """Register until the server answers. Raises `Refused`."""
        if self._options.key is None:
            raise Refused(
                "This worker is not registered: give a registration key by --token-file or CORRAL_WORKER_TOKEN."
            )
        facts = {
            "name": self._options.name,
            "max_agents": self._options.max_agents,
            "labels": self._options.labels,
            "fingerprint": self._folder.fingerprint(),
            **machine.facts(),
            **self._offer,
        }
        client = Client(self._options.url, self._options.key)
        tries = 0
        try:
            while True:
                try:
                    return self._answered(await client.register(facts))
                except (Unreachable, ApiError) as error:
                    if isinstance(error, ApiError) and (not error.passing or (error.is_foreign and error.status < 500)):
                        raise Refused(f"The server does not register this worker: {error.detail}") from None
                    tries += 1
                    if tries == 1:
                        log.warning("waiting for the server: %s", error)
                    await asyncio.sleep(pause(tries, error))
        finally:
            await client.close()

    def _answered(self, answer: Mapping[str, Any]) -> Identity:
        if "token" not in answer:
            raise ApiError(200, {})
        identity = Identity(
            url=self._options.url,
            worker_id=answer["id"],
            token=answer["token"],
            heartbeat_seconds=int(answer.get("heartbeat_seconds") or 15),
            lease_seconds=int(answer.get("lease_seconds") or 60),
        )
        self._folder.store(identity)
        return identity

    async def _become(self, identity: Identity) -> None:
        before = getattr(self, "_client", None)
        self._identity = identity
        self._client = Client(self._options.url, identity.token)
        if before is not None:
            await before.close()

    async def _again(self, refused: Identity) -> None:
        """The token was refused: register anew, once for all that noticed."""
        async with self._registering:
            if self._identity is refused:
                if self._losses.note():
                    raise Refused("Another worker registers with this name and fingerprint (a copy of the --dir?).")
                log.warning("the server does not know this worker's token any more; registering again")
                await self._become(await self._register())

    # -- claims

    async def _claims(self) -> None:
        tries = 0
        told = False
        while True:
            free = self._options.max_agents - len(self._leases)
            if free <= 0 or self._paused:
                await self._wait_for_room()
                continue
            identity = self._identity
            try:
                answer = await self._client.claim(
                    identity.worker_id, max_tasks=min(free, 50), wait_seconds=CLAIM_WAIT_SECONDS
                )
                tries = 0
            except (ApiError, Unreachable) as error:
                tries += 1
                if isinstance(error, ApiError) and error.code == "worker_not_approved":
                    if not told:
                        log.warning("waiting for an admin to approve this worker")
                    told = True
                    await asyncio.sleep(NOT_APPROVED_SECONDS)
                else:
                    await self._stumble(error, identity, tries)
                continue
            told = False
            for claim in answer.get("tasks") or ():
                self._take(claim)
            if not answer.get("tasks"):
                await asyncio.sleep(IDLE_REASONS.get(str(answer.get("reason")), UNKNOWN_REASON_SECONDS))

    def _take(self, claim: Mapping[str, Any]) -> None:
        lease = Lease(self._client, claim, sent=time.monotonic(), seconds=self._identity.lease_seconds)
        self._leases[lease.lease_id] = lease
        task = asyncio.create_task(lease.run(self._runner))
        self._running.add(task)

        def ended(_: asyncio.Task[None]) -> None:
            self._running.discard(task)
            self._leases.pop(lease.lease_id, None)
            self._room.set()
            if not task.cancelled() and isinstance(error := task.exception(), NoProcess):
                self._broken = error
                self.drain()

        task.add_done_callback(ended)

    async def _wait_for_room(self) -> None:
        self._room.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0 if self._paused else None):
                await self._room.wait()

    async def _stumble(self, error: ApiError | Unreachable, identity: Identity, tries: int) -> None:
        """A call failed: wait, and register again where the token is dead or the worker deleted."""
        if isinstance(error, ApiError) and not error.is_foreign and (error.status == 401 or error.code == "not_found"):
            await self._again(identity)
        elif tries == 10 or (tries == 1 and getattr(error, "code", "") != "shutting_down"):
            log.warning("%s", error)
        await asyncio.sleep(pause(tries, error))

    # -- signs of life

    async def _heartbeats(self) -> None:
        tries = 0
        interval = 0.0
        offer: Mapping[str, Any] = self._offer  # once: it may have been started with others than it registered with
        while True:
            identity, sent = self._identity, time.monotonic()
            leases = [{"task_id": lease.task_id, "lease_id": lease.lease_id} for lease in self._leases.values()]
            try:
                body = {**machine.usage(str(self._folder.path)), "leases": leases, **offer}
                answer = await self._client.heartbeat(identity.worker_id, body)
                tries, offer = 0, {}
                self._heard(answer, sent)
                asked = float(answer.get("next_heartbeat_seconds") or identity.heartbeat_seconds)
                leases_live = min([identity.lease_seconds, *(lease.seconds for lease in self._leases.values())])
                interval = min(asked, leases_live / 3)  # work may be quiet for longer than that
            except (ApiError, Unreachable) as error:  # says nothing about the leases: they end by their own clock
                tries += 1
                await self._stumble(error, identity, tries)
                continue
            await asyncio.sleep(max(0.5, interval))

    async def _signals(self) -> None:
        tries, after = 0, 0
        while True:
            identity = self._identity
            try:
                answer = await self._client.signals(identity.worker_id, after=after, wait=SIGNAL_WAIT_SECONDS)
                tries = 0
            except (ApiError, Unreachable) as error:
                tries += 1
                if isinstance(error, ApiError) and error.code == "worker_not_approved":
                    await asyncio.sleep(NOT_APPROVED_SECONDS)
                else:
                    await self._stumble(error, identity, tries)
                continue
            for signal in answer.get("signals") or ():
                after = max(after, int(signal["seq"]))
            self._heard({"leases": answer.get("signals"), "commands": answer.get("commands")}, None)

    def _heard(self, answer: Mapping[str, Any], sent: float | None) -> None:
        """States of leases, commands, and the worker's own state, which outlives a command that was not heard.

        `sent`: when the request was sent, if its answer renews leases.
        """
        for told in answer.get("leases") or ():
            lease = self._leases.get(told["lease_id"])
            if lease is not None:
                if sent is not None and told["state"] != "lost":
                    lease.renew(sent, _seconds(answer.get("server_time"), told.get("expires_at")))
                lease.hear(told["state"])
        for command in answer.get("commands") or ():
            if command in ("drain", "resume"):
                self._pause(command == "drain")
            elif command == "reregister":
                log.warning("the server asks this worker to register again; restart it with a registration key")
        if "status" in answer:
            self._pause(answer["status"] == "draining")

    def _pause(self, is_paused: bool) -> None:
        if is_paused != self._paused:
            self._paused = is_paused
            self._room.set()


def _seconds(server_time: str | None, expires_at: str | None) -> float | None:
    """How long a lease lives, both ends on the server's clock; None: it does not say."""
    if server_time is None or expires_at is None:
        return None
    return max(0.0, (datetime.fromisoformat(expires_at) - datetime.fromisoformat(server_time)).total_seconds())
