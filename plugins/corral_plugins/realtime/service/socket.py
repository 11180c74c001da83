"""Serves `/ws` from the handshake to the close. One task reads, and the connection's main task sends."""

from __future__ import annotations

import asyncio
import contextlib
import time

from corral import clock
from corral.auth.credentials import read_credential
from corral.errors import Forbidden, Malformed, Problem, TooMany, Unauthorized
from corral.http.routes import SocketConnection
from corral.plugin import Settings
from corral_plugins.realtime.service.hub import Hub
from corral_plugins.realtime.service.messages import (
    INVALID,
    MESSAGE_LIMIT,
    TOO_BIG,
    TOO_MANY,
    UNAUTHENTICATED,
    Auth,
    ClientMessage,
    Close,
    Notice,
    Ping,
    Refusal,
    Resume,
    Subscribe,
    Unsubscribe,
    instant,
    read,
    read_cursor,
)
from corral_plugins.realtime.service.replay import Replays
from corral_plugins.realtime.service.rights import Rights, close_code
from corral_plugins.realtime.service.viewer import Viewer
from corral_plugins.realtime.settings import CORS_ORIGINS

SIGN_IN_SECONDS = 10.0
CLOSING_SECONDS = 2.0
MESSAGES_PER_SECOND = 20
YIELD_EVERY = 64


class _Refused(Exception):
    """Raised if the client does not sign in. The socket is closed with this code."""

    def __init__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(reason)


class Sockets:
    """Serves WebSocket connections to `/ws`."""

    def __init__(self, hub: Hub, rights: Rights, replays: Replays, settings: Settings) -> None:
        self._hub, self._rights, self._replays, self._settings = hub, rights, replays, settings

    async def serve(self, connection: SocketConnection) -> None:
        """Serve one connection until it ends."""
        origin = connection.request.header("origin")
        if origin is not None and not self._is_own(origin, connection.request.header("host")):
            detail = "Pages of this origin may not open WebSockets. An admin can add the origin to http.cors_origins."
            await connection.refuse(Forbidden(detail))
            return
        refusal = self._hub.refusal()
        if refusal is not None:
            await connection.refuse(refusal)
            return
        self._hub.signing_in(1)
        try:
            await connection.accept()
            viewer = await self._sign_in(connection)
            self._hub.join(viewer)
        except _Refused as refused:
            await connection.close(refused.code, refused.reason)
            return
        except TooMany as problem:
            await connection.close(TOO_MANY, problem.detail)
            return
        finally:
            self._hub.signing_in(-1)
        try:
            await self._converse(connection, viewer)
        finally:
            self._hub.leave(viewer)

    def _is_own(self, origin: str, host: str | None) -> bool:
        own = {f"{scheme}://{host}".lower() for scheme in ("http", "https")}
        return origin.lower() in own or origin in self._settings.get(CORS_ORIGINS)

    # -- signing in

    async def _sign_in(self, connection: SocketConnection) -> Viewer:
        """Sign in with a credential in the handshake or in the first message."""
        try:
            async with asyncio.timeout(SIGN_IN_SECONDS):
                return await self._by_handshake(connection) or await self._by_message(connection)
        except TimeoutError:
            raise _Refused(UNAUTHENTICATED, f"no sign-in within {SIGN_IN_SECONDS:g} seconds") from None
        except (Malformed, Unauthorized, Forbidden) as problem:
            connection.count_anonymous()
            raise _Refused(INVALID if problem.status == 400 else close_code(problem), problem.code) from None
        except Problem as problem:
            raise _Refused(close_code(problem), problem.code) from None

    async def _by_handshake(self, connection: SocketConnection) -> Viewer | None:
        request, query = connection.request, connection.query
        header = read_credential(request.header("authorization"), request.header("x-api-key"))
        token, ticket = query.get("token"), query.get("ticket")
        if sum(given is not None for given in (header, token, ticket)) > 1:
            raise Malformed("The request contains two credentials; send only one.")
        if ticket is not None:
            return await self._rights.by_ticket(ticket, request.client_ip)
        credential = header or token
        return None if credential is None else await self._rights.by_credential(credential, request.client_ip)

    async def _by_message(self, connection: SocketConnection) -> Viewer:
        message = await connection.receive()
        if message is None:
            raise ConnectionError("disconnected before sign-in")
        try:
            said = read(message)
        except Refusal as refusal:
            raise _Refused(UNAUTHENTICATED, refusal.code) from None
        if not isinstance(said, Auth):
            raise _Refused(UNAUTHENTICATED, "the first message must be auth")
        viewer = await self._rights.by_credential(said.token, connection.request.client_ip)
        viewer.put(_auth_ok(viewer))
        return viewer

    # -- messages

    async def _converse(self, connection: SocketConnection, viewer: Viewer) -> None:
        task = asyncio.current_task()
        assert task is not None
        aborted = False

        def abort() -> None:
            nonlocal aborted
            aborted = True
            task.cancel()

        viewer.abort = abort
        listening = asyncio.create_task(self._listen(connection, viewer))
        try:
            await self._send(connection, viewer)
            await asyncio.wait(
                {listening}, timeout=CLOSING_SECONDS
            )  # closing a socket with unread bytes would reset the connection
        except asyncio.CancelledError:
            if not aborted:
                raise
            task.uncancel()
        finally:
            viewer.leave()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await listening

    @staticmethod
    async def _send(connection: SocketConnection, viewer: Viewer) -> None:
        """Send queued entries until the connection ends.

        While the queue is long, this coroutine regularly yields to other tasks.
        """
        sent = 0
        while (entry := viewer.poll() or await viewer.take()) is not None:
            if isinstance(entry, Close):
                await connection.close(entry.code, entry.reason)
                return
            await connection.send(entry.text)
            sent += 1
            if sent % YIELD_EVERY == 0:
                await asyncio.sleep(0)

    async def _listen(self, connection: SocketConnection, viewer: Viewer) -> None:
        """Read messages until the client closes the connection.

        Messages after the server ended the connection are ignored.
        """
        allowance = Allowance()
        try:
            while (message := await connection.receive()) is not None:
                if viewer.ended:
                    continue
                if len(message.encode() if isinstance(message, str) else message) > MESSAGE_LIMIT:
                    viewer.end(TOO_BIG, "messages are limited to 64 KiB", keep=True)
                elif not allowance.take():
                    self._slow_down(viewer, allowance)
                else:
                    await self._handle(viewer, message)
        finally:
            viewer.leave()

    @staticmethod
    def _slow_down(viewer: Viewer, allowance: Allowance) -> None:
        if allowance.warned:
            viewer.end(TOO_MANY, f"more than {MESSAGES_PER_SECOND} messages a second", keep=True)
        else:
            allowance.warned = True
            detail = f"Send at most {MESSAGES_PER_SECOND} messages a second. The next excess closes the connection."
            viewer.refuse(Refusal("rate_limited", detail))

    async def _handle(self, viewer: Viewer, message: str | bytes) -> None:
        try:
            said = read(message)
            if isinstance(said, Auth):
                await self._renew(viewer, said)
            else:
                self._answer(viewer, said)
        except Refusal as refusal:
            viewer.refuse(refusal)

    def _answer(self, viewer: Viewer, said: ClientMessage) -> None:
        if isinstance(said, Subscribe):
            self._subscribe(viewer, said)
        elif isinstance(said, Unsubscribe):
            self._hub.unsubscribe(viewer, said.event)
            viewer.put(Notice("unsubscribed", event=said.event))
        elif isinstance(said, Resume):
            cursor = read_cursor(said.last_event_id)
            viewer.put(self._replays.make(viewer, cursor, tuple(viewer.subscriptions.values()), confirm=True))
        elif isinstance(said, Ping):
            viewer.put(Notice("pong", ts=clock.now()))

    def _subscribe(self, viewer: Viewer, said: Subscribe) -> None:
        cursor = read_cursor(said.since) if isinstance(said.since, (str, int)) else None
        wanted = frozenset(said.filter.items()) if isinstance(said.filter, dict) else frozenset()
        made = self._hub.subscribe(viewer, said.event, wanted)
        viewer.put(Notice("subscribed", event=said.event, cursor=self._hub.position))
        if cursor is not None:
            viewer.put(self._replays.make(viewer, cursor, (made,)))

    async def _renew(self, viewer: Viewer, said: Auth) -> None:
        try:
            same = await self._rights.renew(viewer, said.token)
        except Problem as problem:
            viewer.revoke(close_code(problem), problem.code)
            return
        if same:
            viewer.put(_auth_ok(viewer))
        else:
            viewer.revoke(UNAUTHENTICATED, "the token belongs to another user")


class Allowance:
    """A token bucket that limits the rate of messages to `MESSAGES_PER_SECOND`."""

    def __init__(self) -> None:
        self.warned = False
        self._left, self._at = float(MESSAGES_PER_SECOND), time.monotonic()

    def take(self) -> bool:
        """Take one token. Return False if the bucket is empty."""
        now = time.monotonic()
        self._left = min(float(MESSAGES_PER_SECOND), self._left + (now - self._at) * MESSAGES_PER_SECOND)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _auth_ok(viewer: Viewer) -> Notice:
    return Notice("auth_ok", user_id=viewer.user, expires_at=instant(viewer.principal.expires_at))
