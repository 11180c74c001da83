"""Checks the client address of every request against the IP rules, and keeps the rules in memory up to date."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from corral import clock
from corral.database.engine import Work
from corral.database.unit import ANONYMOUS, Entry
from corral.errors import Forbidden, Problem
from corral.events.log import LoggedEvent
from corral_plugins.security.service.ip_rules import InForce, IpRules

log = logging.getLogger("corral.security")

POLL_SECONDS = 1.0
AUDIT_SECONDS = 60.0
MAX_VERDICTS = 10_000  # maximum number of cached addresses
HEALTH = ("/health/", "/api/v1/health/")  # these paths and the paths below them, but no other path with the same prefix


class IpGate:
    """Implements `Gate` for the IP rules.

    If the rules are off, a check costs one comparison. Verdicts are cached until the rules change.
    """

    def __init__(self) -> None:
        self.blocked = 0
        self._in_force: InForce | None = None
        self._open = True
        self._verdicts: dict[str, bool] = {}
        self._recorded: dict[str, float] = {}
        self._pending: dict[str, None] = {}

    def check(self, client_ip: str, method: str, path: str) -> None:
        if self._open:
            return
        allowed = self._verdicts.get(client_ip)
        if allowed is None:
            allowed = self._judge(client_ip)
        if not allowed and not f"{path}/".startswith(HEALTH):
            self._refuse(client_ip)

    def apply(self, found: InForce | None) -> None:
        """Replace the rules of this gate. None turns the gate off."""
        self._in_force, self._verdicts = found, {}
        self._open = found is None or found.rules.mode == "off"

    @property
    def version(self) -> int:
        """The version of the rules in this gate, or -1 if no rules are loaded."""
        return -1 if self._in_force is None else self._in_force.version

    @property
    def is_stale(self) -> bool:
        """Whether a rule in this gate has expired since the rules were loaded."""
        until = None if self._in_force is None else self._in_force.until
        return until is not None and until <= clock.now()

    def take_pending(self) -> list[str]:
        """Remove and return the addresses whose rejection must be audited, each at most once a minute."""
        now = clock.time_s()
        self._recorded = {client_ip: at for client_ip, at in self._recorded.items() if now - at < AUDIT_SECONDS}
        found, self._pending = list(self._pending), {}
        return found

    def _judge(self, client_ip: str) -> bool:
        assert self._in_force is not None
        if len(self._verdicts) >= MAX_VERDICTS:
            self._verdicts.clear()
        allowed, _ = self._in_force.rules.judge(client_ip)
        self._verdicts[client_ip] = allowed
        return allowed

    def _refuse(self, client_ip: str) -> None:
        self.blocked += 1
        now = clock.time_s()
        if now - self._recorded.get(client_ip, 0.0) >= AUDIT_SECONDS and len(self._recorded) < MAX_VERDICTS:
            self._recorded[client_ip] = now
            self._pending[client_ip] = None
        raise Forbidden(
            f"The IP rules refuse your address {client_ip}; ask an administrator to allow it.", code="ip_blocked"
        )


class GateKeeper:
    """Keeps the rules in the gate of this process current: immediately after an event, or by polling every second."""

    def __init__(self, work: Work, rules: IpRules, gate: IpGate) -> None:
        self._work, self._rules, self._gate = work, rules, gate
        self._changed = asyncio.Event()

    async def load(self) -> None:
        """Load the current rules into the gate."""
        self._gate.apply(await self._work(self._rules.in_force, read=True))

    def on_events(self, records: Sequence[LoggedEvent]) -> None:
        """Wake up `run` if the IP rules changed. Called by the event feed."""
        if any(record.type == "ip_rules.changed" for record in records):
            self._changed.set()

    async def run(self) -> None:
        """Load changed rules and record rejected requests. Runs as a supervised task."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            try:
                if self._gate.is_stale or await self._work(self._rules.version, read=True) != self._gate.version:
                    await self.load()
                await self._record()
            except Problem as problem:  # the database is unreachable; the loaded rules stay in force
                log.warning("the IP rules could not be read", extra={"reason": problem.detail})

    async def _record(self) -> None:
        """Record each rejection in its own unit of work, because the client address is an attribute of the unit."""
        for client_ip in self._gate.take_pending():
            entry = Entry("ip rules", ANONYMOUS, client_ip=client_ip)
            with contextlib.suppress(Problem):  # the request was rejected anyway; the audit plugin reports failures
                await self._work(self._rules.refused, entry=entry)
