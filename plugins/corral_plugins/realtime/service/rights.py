"""Authenticates connections, and rechecks the permissions of all viewers about once a second.

Each unit of work reloads at most 200 principals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence

from corral import clock
from corral.auth.credentials import Credentials
from corral.auth.principal import Principal
from corral.auth.visibility import EventRights
from corral.database.engine import Work
from corral.errors import Forbidden, Problem, Unauthorized
from corral.plugin import Settings
from corral_core.accounts.api import Tickets
from corral_plugins.realtime.service.hub import ViewerHub
from corral_plugins.realtime.service.messages import FORBIDDEN, UNAUTHENTICATED, NoticeFrame, format_expiry
from corral_plugins.realtime.service.viewer import Viewer
from corral_plugins.realtime.settings import QUEUE_SIZE

log = logging.getLogger("corral.realtime")

PERMISSION = "realtime.read"
SWEEP_SECONDS = 0.75
RETRY_SECONDS = 0.2
BATCH_SIZE = 200
WARN_SECONDS = 60.0


class ViewerRights:
    """Signs viewers in and keeps their permissions up to date."""

    def __init__(
        self,
        hub: ViewerHub,
        work: Work,
        credentials: Credentials,
        tickets: Tickets,
        events: EventRights,
        settings: Settings,
    ) -> None:
        self._hub, self._work, self._events, self._settings = hub, work, events, settings
        self._credentials, self._tickets = credentials, tickets
        self._sweeping: asyncio.Task[None] | None = None

    async def viewer_for_credential(self, credential: str, client_ip: str) -> Viewer:
        """Create a viewer for a token or API key.

        Raise `Unauthorized` if the credential is invalid, or `Forbidden` if its principal is not allowed to receive
        live events.
        """
        return await self._create_viewer(lambda: self._credentials.authenticate(credential), client_ip)

    async def viewer_for_ticket(self, ticket: str, client_ip: str) -> Viewer:
        """Create a viewer for a ticket, and invalidate the ticket.

        Raise `Unauthorized` if the ticket is invalid, or `Forbidden` if its principal is not allowed to receive live
        events.
        """
        principal = await self._work(lambda: self._tickets.redeem(ticket))
        return await self._create_viewer(lambda: self._tickets.reread(principal), client_ip)

    async def renew_credential(self, viewer: Viewer, credential: str) -> bool:
        """Renew a connection's credential with a new token.

        Return False if the token belongs to another user, or to another kind of caller than the earlier credential.

        Raise `Unauthorized` if the token is invalid, or `Forbidden` if its principal is not allowed to receive live
        events.
        """
        fresh = await self.viewer_for_credential(credential, viewer.client_ip)
        if fresh.user_key != viewer.user_key or fresh.principal.kind != viewer.principal.kind:
            return False
        viewer.principal, viewer.reread, viewer.checked = fresh.principal, fresh.reread, fresh.checked
        return True

    async def recheck_regularly(self) -> None:
        """Recheck permissions regularly while any viewers are connected.

        If an event reports a change of permissions, the recheck starts immediately. Runs until cancelled. The kernel
        supervises this task.
        """
        while True:
            await self._hub.occupied.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_SECONDS):
                    await self._hub.rights_changed.wait()
            self._hub.rights_changed.clear()
            await self._wait_for_recheck()

    async def _create_viewer(self, reread: Callable[[], Principal], client_ip: str) -> Viewer:
        checked = asyncio.get_running_loop().time()
        principal = await self._work(reread, read=True)
        _check_may_receive_events(principal)
        principal.check_address(client_ip)
        viewer = Viewer(principal, reread, checked, self._settings.get(QUEUE_SIZE), client_ip, self._events.can_read)
        viewer.fresh = self._wait_for_recheck
        return viewer

    async def _wait_for_recheck(self) -> None:
        """Wait for the permission recheck that is running, or start one and wait for it.

        Concurrent callers share one recheck.
        """
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._recheck_all())
        await asyncio.shield(self._sweeping)

    async def _recheck_all(self) -> None:
        viewers = list(self._hub.viewers)
        for start in range(0, len(viewers), BATCH_SIZE):
            part = viewers[start : start + BATCH_SIZE]
            began = asyncio.get_running_loop().time()
            try:
                found = await self._work(lambda part=part: _read_principals(part), read=True)  # type: ignore[misc]  # bound per round
            except Problem:  # without the database there are no events either, so no outdated permission is used
                log.warning("rights of live connections could not be read", exc_info=True)
                await asyncio.sleep(RETRY_SECONDS)
                return
            for viewer, principal in zip(part, found, strict=True):
                self._apply_rights(viewer, principal, began)

    @staticmethod
    def _apply_rights(viewer: Viewer, found: Principal | Problem, began: float) -> None:
        try:
            if isinstance(found, Problem):
                raise found
            _check_may_receive_events(found)
        except Problem as problem:
            viewer.revoke_access(close_code(problem), problem.code)
            return
        if viewer.checked > began:  # renewed while this recheck was running
            return
        viewer.principal, viewer.checked = found, began
        ends = found.expires_at
        if ends is not None and ends - clock.time_s() <= WARN_SECONDS and viewer.warned_of != ends:
            viewer.warned_of = ends
            viewer.queue_entry(NoticeFrame("token_expiring", expires_at=format_expiry(ends)))


def close_code(problem: Problem) -> int:
    """Return the WebSocket close code for an authentication or permission error."""
    return FORBIDDEN if problem.status == 403 else UNAUTHENTICATED


def _check_may_receive_events(principal: Principal) -> None:
    """Raise `Forbidden` or `Unauthorized` unless the principal may receive live events."""
    if principal.kind == "worker":
        raise Forbidden("Workers cannot follow events. They receive signals from GET /api/v1/workers/{id}/signals.")
    if principal.limited is not None:
        raise Forbidden(code=principal.limited)
    if not principal.may(PERMISSION):
        raise Forbidden(f"Live connections require the permission {PERMISSION}.")
    if principal.expires_at is not None and principal.expires_at <= clock.time_s():
        raise Unauthorized("The credential has expired; authenticate again.", code="token_expired")


def _read_principals(viewers: Sequence[Viewer]) -> list[Principal | Problem]:
    """Return each viewer's current principal, or the error that occurred while reading it.

    Raise only errors that affect all viewers.
    """
    found: list[Principal | Problem] = []
    for viewer in viewers:
        try:
            found.append(viewer.reread())
        except Problem as problem:
            if problem.status >= 500 and problem.code != "plugin_failed":
                raise
            found.append(problem)
    return found
