"""Serves `/ws` from the handshake until the connection is closed.

For each connection, one task reads messages, and the main task sends frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from corral import clock
from corral.auth.credentials import read_credential
from corral.errors import Forbidden, Malformed, Problem, TooMany, Unauthorized
from corral.http.routes import SocketConnection
from corral.plugin import Settings
from corral_plugins.realtime.service.hub import ViewerHub
from corral_plugins.realtime.service.messages import (
    INVALID,
    MESSAGE_LIMIT,
    TOO_BIG,
    TOO_MANY,
    UNAUTHENTICATED,
    AuthMessage,
    ClientMessage,
    CloseFrame,
    NoticeFrame,
    PingMessage,
    Refusal,
    ResumeMessage,
    SubscribeMessage,
    UnsubscribeMessage,
    format_expiry,
    parse_message,
    read_cursor,
)
from corral_plugins.realtime.service.replay import ReplayFactory
from corral_plugins.realtime.service.rights import ViewerRights, close_code
from corral_plugins.realtime.service.viewer import Viewer
from corral_plugins.realtime.settings import CORS_ORIGINS

SIGN_IN_SECONDS = 10.0
CLOSING_SECONDS = 2.0
MESSAGES_PER_SECOND = 20
YIELD_EVERY = 64


class _SignInRefused(Exception):
    """Raised if the client fails to sign in. The server closes the socket with `code` and `reason`."""

    def __init__(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason
        super().__init__(reason)


class WebSocketServer:
    """Serves WebSocket connections to `/ws`."""

    def __init__(self, hub: ViewerHub, rights: ViewerRights, replays: ReplayFactory, settings: Settings) -> None:
        self._hub, self._rights, self._replays, self._settings = hub, rights, replays, settings

    async def serve_connection(self, connection: SocketConnection) -> None:
        """Serve one connection until it ends."""
        origin = connection.request.header("origin")
        if origin is not None and not self._is_allowed_origin(origin, connection.request.header("host")):
            detail = "Pages of this origin may not open WebSockets. An admin can add the origin to http.cors_origins."
            await connection.refuse(Forbidden(detail))
            return
        with contextlib.ExitStack() as waiting:
            try:
                if (refusal := self._hub.connection_refusal()) is not None:
                    raise refusal
                if not _has_credential(connection):
                    waiting.enter_context(self._hub.pending_sign_in(connection.request.client_ip))
            except Problem as problem:
                await connection.refuse(problem)
                return
            try:
                await connection.accept()
                viewer = await self._sign_in(connection)
                self._hub.add_viewer(viewer)
            except _SignInRefused as refused:
                await connection.close(refused.code, refused.reason)
                return
            except TooMany as problem:
                await connection.close(TOO_MANY, problem.detail)
                return
        try:
            await self._run_connection(connection, viewer)
        finally:
            self._hub.remove_viewer(viewer)

    def _is_allowed_origin(self, origin: str, host: str | None) -> bool:
        own = {f"{scheme}://{host}".lower() for scheme in ("http", "https")}
        return origin.lower() in own or origin in self._settings.get(CORS_ORIGINS)

    # -- signing in

    async def _sign_in(self, connection: SocketConnection) -> Viewer:
        """Sign the client in with a credential from the handshake or from the first message."""
        try:
            async with asyncio.timeout(SIGN_IN_SECONDS):
                return await self._sign_in_by_handshake(connection) or await self._sign_in_by_message(connection)
        except TimeoutError:
            raise _SignInRefused(UNAUTHENTICATED, f"no sign-in within {SIGN_IN_SECONDS:g} seconds") from None
        except (Malformed, Unauthorized, Forbidden) as problem:
            connection.count_anonymous()
            raise _SignInRefused(INVALID if problem.status == 400 else close_code(problem), problem.code) from None
        except Problem as problem:
            raise _SignInRefused(close_code(problem), problem.code) from None

    async def _sign_in_by_handshake(self, connection: SocketConnection) -> Viewer | None:
        request, query = connection.request, connection.query
        header = read_credential(request.header("authorization"), request.header("x-api-key"))
        token, ticket = query.get("token"), query.get("ticket")
        if sum(given is not None for given in (header, token, ticket)) > 1:
            raise Malformed("The request contains two credentials; send only one.")
        if ticket is not None:
            return await self._rights.viewer_for_ticket(ticket, request.client_ip)
        credential = token if header is None else header
        return None if credential is None else await self._rights.viewer_for_credential(credential, request.client_ip)

    async def _sign_in_by_message(self, connection: SocketConnection) -> Viewer:
        message = await connection.receive()
        if message is None:
            raise ConnectionError("the client disconnected before it signed in")
        try:
            said = parse_message(message)
        except Refusal as refusal:
            raise _SignInRefused(UNAUTHENTICATED, refusal.code) from None
        if not isinstance(said, AuthMessage):
            raise _SignInRefused(UNAUTHENTICATED, "the first message must be auth")
        viewer = await self._rights.viewer_for_credential(said.token, connection.request.client_ip)
        viewer.queue_entry(_auth_ok(viewer))
        return viewer

    # -- messages

    async def _run_connection(self, connection: SocketConnection, viewer: Viewer) -> None:
        task = asyncio.current_task()
        assert task is not None
        aborted = False

        def abort() -> None:
            nonlocal aborted
            aborted = True
            task.cancel()

        viewer.abort = abort
        listening = asyncio.create_task(self._read_messages(connection, viewer))
        try:
            await self._send_entries(connection, viewer)
            await asyncio.wait(
                {listening}, timeout=CLOSING_SECONDS
            )  # closing a socket with unread bytes would reset the connection
        except asyncio.CancelledError:
            if not aborted:
                raise
            task.uncancel()
        finally:
            viewer.stop_sending()
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await listening

    @staticmethod
    async def _send_entries(connection: SocketConnection, viewer: Viewer) -> None:
        """Send queued entries until the connection ends.

        While the queue is long, this coroutine yields to other tasks regularly.
        """
        sent = 0
        while (entry := viewer.pop_sendable_entry() or await viewer.wait_for_entry()) is not None:
            if isinstance(entry, CloseFrame):
                await connection.close(entry.code, entry.reason)
                return
            await connection.send(entry.text)
            sent += 1
            if sent % YIELD_EVERY == 0:
                await asyncio.sleep(0)

    async def _read_messages(self, connection: SocketConnection, viewer: Viewer) -> None:
        """Read messages until the client closes the connection.

        Messages that arrive after the server has ended the connection are ignored.
        """
        allowance = MessageRateLimit()
        try:
            while (message := await connection.receive()) is not None:
                if viewer.ended:
                    continue
                if len(message.encode() if isinstance(message, str) else message) > MESSAGE_LIMIT:
                    viewer.end_connection(TOO_BIG, "messages are limited to 64 KiB", keep=True)
                elif not allowance.take_token():
                    self._enforce_rate_limit(viewer, allowance)
                else:
                    await self._handle_message(viewer, message)
        finally:
            viewer.stop_sending()

    @staticmethod
    def _enforce_rate_limit(viewer: Viewer, allowance: MessageRateLimit) -> None:
        if allowance.warned:
            viewer.end_connection(TOO_MANY, f"more than {MESSAGES_PER_SECOND} messages a second", keep=True)
        else:
            allowance.warned = True
            detail = (
                f"Send at most {MESSAGES_PER_SECOND} messages a second. "
                "The server closes the connection if this happens again."
            )
            viewer.send_refusal(Refusal("rate_limited", detail))

    async def _handle_message(self, viewer: Viewer, message: str | bytes) -> None:
        try:
            said = parse_message(message)
            if isinstance(said, AuthMessage):
                await self._handle_auth(viewer, said)
            else:
                self._answer_message(viewer, said)
        except Refusal as refusal:
            viewer.send_refusal(refusal)

    def _answer_message(self, viewer: Viewer, said: ClientMessage) -> None:
        if isinstance(said, SubscribeMessage):
            self._handle_subscribe(viewer, said)
        elif isinstance(said, UnsubscribeMessage):
            self._hub.unsubscribe(viewer, said.event)
            viewer.queue_entry(NoticeFrame("unsubscribed", event=said.event))
        elif isinstance(said, ResumeMessage):
            cursor = read_cursor(said.last_event_id)
            viewer.queue_entry(
                self._replays.create_replay(viewer, cursor, tuple(viewer.subscriptions.values()), confirm=True)
            )
        elif isinstance(said, PingMessage):
            viewer.queue_entry(NoticeFrame("pong", ts=clock.now()))

    def _handle_subscribe(self, viewer: Viewer, said: SubscribeMessage) -> None:
        cursor = read_cursor(said.since) if isinstance(said.since, (str, int)) else None
        wanted = frozenset(said.filter.items()) if isinstance(said.filter, dict) else frozenset()
        made = self._hub.subscribe(viewer, said.event, wanted)
        viewer.queue_entry(NoticeFrame("subscribed", event=said.event, cursor=self._hub.position))
        if cursor is not None:
            viewer.queue_entry(self._replays.create_replay(viewer, cursor, (made,)))

    async def _handle_auth(self, viewer: Viewer, said: AuthMessage) -> None:
        try:
            same = await self._rights.renew_credential(viewer, said.token)
        except Problem as problem:
            viewer.revoke_access(close_code(problem), problem.code)
            return
        if same:
            viewer.queue_entry(_auth_ok(viewer))
        else:
            viewer.revoke_access(UNAUTHENTICATED, "the token belongs to another user")


class MessageRateLimit:
    """A token bucket that limits the rate of messages to `MESSAGES_PER_SECOND`."""

    def __init__(self) -> None:
        self.warned = False
        self._left, self._at = float(MESSAGES_PER_SECOND), time.monotonic()

    def take_token(self) -> bool:
        """Take one token. Return False if the bucket is empty."""
        now = time.monotonic()
        self._left = min(float(MESSAGES_PER_SECOND), self._left + (now - self._at) * MESSAGES_PER_SECOND)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _has_credential(connection: SocketConnection) -> bool:
    """Return whether the handshake contains a credential, valid or not."""
    request, query = connection.request, connection.query
    headers = (request.header("authorization"), request.header("x-api-key"))
    return any(given is not None for given in (*headers, query.get("token"), query.get("ticket")))


def _auth_ok(viewer: Viewer) -> NoticeFrame:
    return NoticeFrame("auth_ok", user_id=viewer.user_key, expires_at=format_expiry(viewer.principal.expires_at))
