"""Tickets for sockets: a browser cannot send a header with a WebSocket, and a token in a URL would end in logs."""

from __future__ import annotations

import msgspec

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.crypto import digest, new_secret
from corral.errors import Unauthorized
from corral_core.accounts.models import TicketRow

LIFE_SECONDS = 30


class TicketsService:
    """Implements `corral_core.accounts.api.Tickets`."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def issue(self, caller: Principal) -> str:
        ticket = new_secret()
        TicketRow.create(hash=digest(ticket), caller=msgspec.to_builtins(caller), expires_at=clock.now(LIFE_SECONDS))
        return ticket

    def redeem(self, ticket: str) -> Principal:
        found = list(TicketRow.delete().where(TicketRow.hash == digest(ticket)).returning(TicketRow).execute())
        if not found or found[0].expires_at <= clock.now():
            raise Unauthorized("The ticket was used, is too old, or is not of this installation; ask for another one.")
        return self.reread(msgspec.convert(found[0].caller, Principal))

    def reread(self, caller: Principal) -> Principal:
        found = self._credentials.reread(caller)
        ends = [at for at in (found.expires_at, caller.expires_at) if at is not None]  # of a rotated key it is earlier
        return msgspec.structs.replace(found, expires_at=min(ends, default=None))


def prune(at_once: int = 500) -> int:
    """Delete tickets that nobody used in time."""
    old = TicketRow.select(TicketRow.hash).where(TicketRow.expires_at <= clock.now()).limit(at_once)
    return int(TicketRow.delete().where(TicketRow.hash.in_(old)).execute())
