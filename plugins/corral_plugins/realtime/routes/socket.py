"""`/ws`: the protocol, one function a message."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from corral import clock
from corral.auth.credentials import read_credential
from corral.database.engine import Work
from corral.errors import Problem, TooMany, Unauthorized
from corral.events import log as event_log
from corral.http.sockets import Socket, SocketConnection
from corral.plugin import Settings
from corral.schema.strict_json import parse_json
from corral_plugins.realtime.service.frames import frame
from corral_plugins.realtime.service.hub import Hub
from corral_plugins.realtime.service.viewer import (
    BAD_FRAMES,
    FILTERS,
    FORBIDDEN,
    TOO_MANY,
    UNAUTHENTICATED,
    Subscription,
    Viewer,
)
from corral_plugins.realtime.settings import CORS_ORIGINS

MESSAGE_LIMIT, TOO_LARGE = 64 * 1024, 1009
SIGN_IN_SECONDS, SEND_SECONDS = 10.0, 5.0
MESSAGES_A_SECOND, MAX_SUBSCRIPTIONS, MAX_ERRORS = 20, 50, 10


class Refusal(Exception):
    """An `error` frame."""

    def __init__(self, code: str, detail: str) -> None:
        self.code, self.detail = code, detail
        super().__init__(detail)


class Close(Exception):
    """The connection ends with this code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(str(code))


async def serve(connection: SocketConnection, hub: Hub, work: Work, settings: Settings) -> None:
    """A socket from handshake to close."""
    origin = connection.request.header("origin")
    if origin is not None and not _is_own(origin, connection.request.header("host"), settings.get(CORS_ORIGINS)):
        await connection.refuse(403, "forbidden", "Sockets are not opened from other web pages; see http.cors_origins.")
    elif hub.full:
        await connection.refuse(503, "overloaded", "This process has as many connections as it takes.")
    else:
        await connection.accept()
        await Session(connection, hub, work).run()


socket = Socket("/ws", serve)


class Session:
    """One accepted socket."""

    def __init__(self, connection: SocketConnection, hub: Hub, work: Work) -> None:
        self._connection, self._hub, self._work = connection, hub, work
        self._viewer: Viewer | None = None
        self._errors = 0
        self._second, self._in_second, self._warned = 0, 0, False

    async def run(self) -> None:
        """Sign in, then talk until either side ends it."""
        try:
            viewer = await self._sign_in()
        except Close as close:
            await self._connection.close(close.code)
            return
        if viewer is None:
            return
        self._viewer = viewer
        tasks = [
            asyncio.ensure_future(work) for work in (self._listen(viewer), self._write(viewer), viewer.ended.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            results = [task.result() for task in done]
            code = next((result for result in results if isinstance(result, int) and result is not True), None)
        except ConnectionError:
            code = None
        finally:
            self._hub.leave(viewer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._end(viewer, code if viewer.close_code is None else viewer.close_code)

    async def _end(self, viewer: Viewer, code: int | None) -> None:
        if code is None:
            return
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(SEND_SECONDS):
                for _, _, text in list(viewer.waiting)[-1:] if viewer.close_code is not None else ():
                    await self._connection.send(text)
                await self._connection.close(code)

    # -- signing in

    async def _sign_in(self) -> Viewer | None:
        query, request = self._connection.query, self._connection.request
        try:
            if "ticket" in query:
                caller, reread = await self._hub.redeem(query["ticket"])
            else:
                credential = query.get("token") or read_credential(
                    request.header("authorization"), request.header("x-api-key")
                )
                first = credential is None
                if credential is None:
                    credential = await self._first_message()
                if credential is None:
                    return None
                caller, reread = await self._hub.authenticate(credential)
                if first:
                    await self._connection.send(_auth_ok(caller.user_id or caller.id, caller.expires_at))
            return self._hub.join(caller, reread)
        except TooMany:
            raise Close(TOO_MANY) from None
        except Problem as problem:
            raise Close(FORBIDDEN if problem.status == 403 else UNAUTHENTICATED) from None

    async def _first_message(self) -> str | None:
        try:
            async with asyncio.timeout(SIGN_IN_SECONDS):
                message = await self._connection.receive()
        except TimeoutError:
            raise Unauthorized("No sign-in within 10 seconds.") from None
        if message is None:
            return None
        try:
            body = _parse(message)
        except Refusal as refusal:
            raise Unauthorized(refusal.detail) from None
        if body.get("type") != "auth" or not isinstance(body.get("token"), str):
            raise Unauthorized('The first message must be {"type": "auth", "token": "…"}.')
        return str(body["token"])

    # -- both directions

    async def _write(self, viewer: Viewer) -> None:
        while True:
            await viewer.wake.wait()
            viewer.wake.clear()
            while viewer.waiting and viewer.close_code is None:
                await self._connection.send(viewer.waiting.popleft()[2])
                viewer.room.set()

    async def _listen(self, viewer: Viewer) -> int | None:
        """Answer messages; the close code when the client misbehaves, None when it has gone."""
        while True:
            message = await self._connection.receive()
            if message is None:
                return None
            if len(message) > MESSAGE_LIMIT:
                return TOO_LARGE
            try:
                self._pace()
                await self._handle(viewer, _parse(message))
            except Close as close:
                return close.code
            except Refusal as refusal:
                self._errors += 1
                viewer.put(0, "", frame("error", code=refusal.code, detail=refusal.detail))
                if self._errors >= MAX_ERRORS:
                    await asyncio.sleep(0.05)  # so that the last error is on its way
                    return BAD_FRAMES

    def _pace(self) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        if self._in_second > MESSAGES_A_SECOND:
            if self._warned:
                raise Close(TOO_MANY)
            self._warned, self._in_second = True, 0
            raise Refusal(
                "rate_limited", f"At most {MESSAGES_A_SECOND} messages a second; the next excess closes the socket."
            )

    async def _handle(self, viewer: Viewer, body: dict[str, Any]) -> None:
        answer: Callable[[Viewer, dict[str, Any]], Any] | None = {
            "ping": self._ping, "subscribe": self._subscribe, "unsubscribe": self._unsubscribe, "resume": self._resume,
            "auth": self._sign_in_again,
        }.get(str(body.get("type")))  # fmt: skip
        if answer is None:
            raise Refusal("validation_error", "type is one of auth, ping, resume, subscribe, unsubscribe.")
        await answer(viewer, body)

    async def _ping(self, viewer: Viewer, body: dict[str, Any]) -> None:
        viewer.put(0, "", frame("pong", ts=clock.now()))

    async def _subscribe(self, viewer: Viewer, body: dict[str, Any]) -> None:
        pattern, wanted = body.get("event"), body.get("filter") or {}
        if (
            set(body) - {"type", "event", "filter", "since"}
            or not isinstance(wanted, dict)
            or set(wanted) - set(FILTERS)
        ):
            raise Refusal(
                "validation_error", f"subscribe takes event, filter and since; filter takes {', '.join(FILTERS)}."
            )
        if not isinstance(pattern, str) or not self._hub.types.knows(pattern):
            raise Refusal("unknown_event", f"No event is named {pattern!r}; GET /api/v1/events/types lists them.")
        subscription = Subscription(
            pattern, frozenset(self._hub.types.expand([pattern])), tuple(sorted(wanted.items()))
        )
        if (
            len(viewer.subscriptions) >= MAX_SUBSCRIPTIONS
            and (pattern, subscription.filter) not in viewer.subscriptions
        ):
            raise Refusal("subscription_limit", f"At most {MAX_SUBSCRIPTIONS} subscriptions a socket.")
        place = await self._place(body["since"]) if body.get("since") is not None else None
        self._hub.subscribe(viewer, subscription)
        viewer.put(0, "", frame("subscribed", event=pattern, cursor=self._hub.position))
        if place is not None:
            await self._hub.replay(viewer, place, [subscription])

    async def _unsubscribe(self, viewer: Viewer, body: dict[str, Any]) -> None:
        self._hub.unsubscribe(viewer, str(body.get("event")))
        viewer.put(0, "", frame("unsubscribed", event=str(body.get("event"))))

    async def _resume(self, viewer: Viewer, body: dict[str, Any]) -> None:
        place = await self._place(body.get("last_event_id"))
        reached = await self._hub.replay(viewer, place, list(viewer.subscriptions.values()))
        viewer.put(0, "", frame("resumed", cursor=reached))

    async def _place(self, given: Any) -> int:
        text = str(given)
        place = await self._work(lambda: event_log.seq_of(text), read=True)
        if place is None:
            raise Refusal(
                "validation_error", f"{text[:64]!r} is neither a seq nor the id of an event that is still kept."
            )
        return place

    async def _sign_in_again(self, viewer: Viewer, body: dict[str, Any]) -> None:
        try:
            caller, reread = await self._hub.authenticate(str(body.get("token")))
        except Problem:
            raise Close(UNAUTHENTICATED) from None
        if caller.user_id != viewer.caller.user_id:
            raise Close(UNAUTHENTICATED)
        viewer.caller, viewer.reread, viewer.warned = caller, reread, False
        viewer.put(0, "", _auth_ok(caller.user_id or caller.id, caller.expires_at))


def _parse(message: str | bytes) -> dict[str, Any]:
    try:
        body = parse_json(message.encode("utf-8", "surrogatepass") if isinstance(message, str) else message)
    except Problem as problem:
        raise Refusal("malformed_json", problem.detail) from None
    if not isinstance(body, dict):
        raise Refusal("validation_error", "Messages are JSON objects with a type.")
    return body


def _auth_ok(user_id: str, expires_at: float | None) -> str:
    return frame("auth_ok", user_id=user_id, expires_at=clock.format_instant(expires_at) if expires_at else None)


def _is_own(origin: str, host: str | None, allowed: list[str]) -> bool:
    return origin in allowed or (host is not None and urlsplit(origin).netloc.lower() == host.lower())
