"""The gate that judges every request by the client's address, and what keeps it up to date."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from corral import clock
from corral.database.engine import Work
from corral.database.unit import ANONYMOUS, Entry
from corral.errors import Forbidden, Problem
from corral.events.log import Record
from corral_plugins.security.service.ip_rules import InForce, IpRules

log = logging.getLogger("corral.security")

LOOK_EVERY = 1.0
AUDIT_EVERY = 60.0
VERDICTS = 10_000  # addresses that are remembered
HEALTH = ("/health/", "/api/v1/health/")  # and what lies below, but nothing else that begins so


class IpGate:
    """Implements `Gate`. Without rules it costs one comparison; verdicts are kept until the rules change."""

    def __init__(self) -> None:
        self.blocked = 0
        self._in_force: InForce | None = None
        self._open = True
        self._verdicts: dict[str, bool] = {}
        self._told: dict[str, float] = {}
        self._untold: dict[str, None] = {}

    def check(self, client_ip: str, method: str, path: str) -> None:
        if self._open:
            return
        allowed = self._verdicts.get(client_ip)
        if allowed is None:
            allowed = self._judge(client_ip)
        if not allowed and not f"{path}/".startswith(HEALTH):
            self._refuse(client_ip)

    def rule(self, found: InForce | None) -> None:
        """From now on these count; None: none."""
        self._in_force, self._verdicts = found, {}
        self._open = found is None or found.rules.mode == "off"

    @property
    def version(self) -> int:
        """Of the rules that count here."""
        return -1 if self._in_force is None else self._in_force.version

    @property
    def is_stale(self) -> bool:
        """Whether a rule has expired since."""
        until = None if self._in_force is None else self._in_force.until
        return until is not None and until <= clock.now()

    def untold(self) -> list[str]:
        """Addresses whose refusal is to be put on record: each at most once a minute."""
        now = clock.time_s()
        self._told = {client_ip: at for client_ip, at in self._told.items() if now - at < AUDIT_EVERY}
        found, self._untold = list(self._untold), {}
        return found

    def _judge(self, client_ip: str) -> bool:
        assert self._in_force is not None
        if len(self._verdicts) >= VERDICTS:
            self._verdicts.clear()
        allowed, _ = self._in_force.rules.judge(client_ip)
        self._verdicts[client_ip] = allowed
        return allowed

    def _refuse(self, client_ip: str) -> None:
        self.blocked += 1
        now = clock.time_s()
        if now - self._told.get(client_ip, 0.0) >= AUDIT_EVERY and len(self._told) < VERDICTS:
            self._told[client_ip] = now
            self._untold[client_ip] = None
        raise Forbidden(f"Your address, {client_ip}, may not use this installation.", code="ip_blocked")


class GateKeeper:
    """Keeps the gate of this process by the rows: at once after an event, else within a second."""

    def __init__(self, work: Work, rules: IpRules, gate: IpGate) -> None:
        self._work, self._rules, self._gate = work, rules, gate
        self._bell = asyncio.Event()

    async def load(self) -> None:
        """Read the rules."""
        self._gate.rule(await self._work(self._rules.in_force, read=True))

    def hear(self, records: Sequence[Record]) -> None:
        """A viewer of the event feed."""
        if any(record.type == "ip_rules.changed" for record in records):
            self._bell.set()

    async def run(self) -> None:
        """Look for changes, and record refusals, for ever. Supervised."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY):
                    await self._bell.wait()
            self._bell.clear()
            try:
                if self._gate.is_stale or await self._work(self._rules.version, read=True) != self._gate.version:
                    await self.load()
                await self._record()
            except Problem as problem:  # the database is away: the rules that are known go on
                log.warning("the IP rules could not be read", extra={"reason": problem.detail})

    async def _record(self) -> None:
        """Refusals go on record one a unit, so that each tells its client."""
        for client_ip in self._gate.untold():
            entry = Entry("ip rules", ANONYMOUS, client_ip=client_ip)
            with contextlib.suppress(Problem):  # it is refused all the same; the log is told of by others
                await self._work(self._rules.refused, entry=entry)
