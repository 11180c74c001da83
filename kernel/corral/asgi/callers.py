"""Who calls, how much they may still ask for, and whether they may ask for this."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from corral.asgi.audited import Audited
from corral.asgi.call import Call
from corral.asgi.endpoint import Endpoint
from corral.auth.credentials import CHALLENGE, REMEMBER_SECONDS, STILL_THERE, Credentials, read_credential
from corral.auth.principal import Principal
from corral.clock import time_s
from corral.database.engine import Database
from corral.database.unit import Entry
from corral.errors import Forbidden, Malformed, Unauthorized, Unavailable
from corral.plugin import Gate, LeaseCallers, Meter

AT_ONCE_SECONDS = 0.3


class Callers:
    """The stages of the request path between the gates and the body; it holds no request state."""

    def __init__(
        self,
        credentials: Credentials,
        gates: Sequence[Gate | Meter],
        leases: LeaseCallers | None,
        audited: Audited,
        database: Database,
    ) -> None:
        self._credentials, self._leases, self._audited, self._database = credentials, leases, audited, database
        self.meters = tuple(gate for gate in gates if isinstance(gate, Meter))

    def arrive(self, call: Call, endpoint: Any) -> None:
        """Count a request of which nobody is known yet: 429."""
        anonymous = endpoint is None or endpoint.public or not _gives_credential(call)
        if not anonymous and not endpoint.client_rate:
            return
        route = None if endpoint is None else endpoint.route
        for meter in self.meters:
            call.count(meter.arrive(call.client_ip, route, anonymous=anonymous))

    async def admit(self, call: Call, endpoint: Endpoint) -> Principal:
        """The caller, who may ask for this: 401, 429, 403. Of a call that is under way, without counting it again."""
        try:
            caller = await self._known(call, endpoint)
        except (Malformed, Unauthorized, Forbidden):  # what is no credential here counts as if nothing had been sent
            for meter in self.meters if _gives_credential(call) else ():
                call.count(meter.arrive(call.client_ip, None, anonymous=True))
            raise
        for meter in self.meters if call.caller is None else ():
            call.count(meter.enter(caller, endpoint.route, call.client_ip))
            call.inside += ((meter, caller),)
        if endpoint.route.on_lease and caller.worker_id is not None:
            caller = await self._under_lease(call, caller)
        call.caller = caller
        try:
            endpoint.permit(caller)
        except Forbidden as refusal:
            if endpoint.privileged:
                await self._audited.denied(call, endpoint, caller, refusal)
            raise
        return caller

    @staticmethod
    def leave(call: Call) -> None:
        """The answer is there."""
        for meter, caller in call.inside:
            meter.leave(caller)

    async def _known(self, call: Call, endpoint: Endpoint) -> Principal:
        """Who calls: 401. Remembered routes take whose the credential was shortly before, if no row can be read."""
        call.once(b"authorization", b"x-api-key")
        given = (call.headers.get(b"authorization"), call.headers.get(b"x-api-key"))
        principal = self._credentials.known(given)
        if principal is None or endpoint.refuses(principal):  # a right may have come by another process
            credential = read_credential(call.header(b"authorization"), call.header(b"x-api-key"))
            if credential is None:
                raise Unauthorized("Send Authorization: Bearer <token>.", headers={"WWW-Authenticate": "Bearer"})
            known = self._credentials.known(given, REMEMBER_SECONDS) if endpoint.route.remembered else None
            principal = await self._authenticate(call, credential, known)
            if principal is not known:
                self._credentials.keep(given, principal)
        principal.check_address(call.client_ip)
        if principal.expires_at is not None and principal.expires_at <= time_s():
            raise Unauthorized(code="token_expired", headers=CHALLENGE)
        return principal

    async def _authenticate(self, call: Call, credential: str, known: Principal | None) -> Principal:
        """Whose the credential is. `known` is the answer if none comes at once."""
        try:
            async with asyncio.timeout(None if known is None else AT_ONCE_SECONDS):
                entry = Entry("authentication" if call.caller is None else STILL_THERE)
                return await self._database.read(lambda: self._credentials.authenticate(credential), entry)
        except (Unavailable, TimeoutError):
            if known is None:
                raise
            return known

    async def _under_lease(self, call: Call, worker: Principal) -> Principal:
        """A worker that names a lease acts as its agent, for its task."""
        lease, leases = call.header(b"corral-lease"), self._leases
        if lease is None or leases is None:
            return worker
        return await self._database.read(lambda: leases.caller(worker, lease.lower()), Entry("lease"))


def _gives_credential(call: Call) -> bool:
    return b"authorization" in call.headers or b"x-api-key" in call.headers
