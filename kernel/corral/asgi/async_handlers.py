"""Runs `async def` handlers, which open their own units of work.

Applies time limits and idempotency keys, and cancels a handler when its client disconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from corral.asgi.endpoint import Endpoint
from corral.asgi.request import ClientLeft, IncomingRequest
from corral.asgi.response import Response, render, replay
from corral.asgi.streams import recorded
from corral.database.engine import Database
from corral.database.unit import Entry
from corral.errors import Unavailable
from corral.http.idempotency import RENEW_SECONDS, Idempotency, Keyed, Stored

T = TypeVar("T")


class AsyncHandlers:
    """Runs `async def` handlers.

    The idempotency key of a request stays in flight for as long as the handler runs. After a crash, the key can be
    used again within `IN_FLIGHT_SECONDS`.
    """

    def __init__(self, database: Database, idempotency: Idempotency) -> None:
        self._database, self._idempotency = database, idempotency

    async def run(self, request: IncomingRequest, endpoint: Endpoint) -> Response:
        """Return the handler's response, or the response that is already stored under the request's idempotency key."""
        key, entry = request.idempotency_key, request.entry(request.principal)
        if key is None:
            return await _handle(request, endpoint)
        stored = await self._database.work(lambda: self._idempotency.begin(key), entry=entry)
        if stored is not None:
            return replay(stored)
        renewing = asyncio.ensure_future(self._renew(key, entry))

        async def release() -> None:
            renewing.cancel()
            forget = self._database.work(lambda: self._idempotency.forget(key), entry=entry)
            await asyncio.shield(forget)  # the task of this request may be cancelled

        async def store(response: Response, body: bytes) -> None:
            renewing.cancel()
            headers = {**response.headers, "Content-Type": response.media_type.decode()}
            answer, secret = Stored(response.status, headers, body), endpoint.route.no_store
            await self._database.work(lambda: self._idempotency.finish(key, answer, secret=secret), entry=entry)

        try:
            response = await _handle(request, endpoint)
            if response.chunks is None:
                await store(response, response.body)
        except BaseException:
            await release()
            raise
        if response.chunks is not None:
            response.chunks = recorded(
                response.chunks,
                lambda body: release() if body is None or not response.is_whole() else store(response, body),
            )
        return response

    async def _renew(self, key: Keyed, entry: Entry) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            await self._database.work(lambda: self._idempotency.renew(key), entry=entry)


async def _handle(request: IncomingRequest, endpoint: Endpoint) -> Response:
    seconds = endpoint.route.seconds
    try:
        async with asyncio.timeout(seconds):
            running = endpoint.handler(**request.arguments)
            value = await (_until_client_leaves(request, running) if endpoint.route.abandoned else running)
            return render(value, endpoint, request)
    except TimeoutError:
        raise Unavailable(f"The operation took longer than {seconds:g} seconds.", code="overloaded") from None


async def _until_client_leaves(request: IncomingRequest, handler: Coroutine[Any, Any, T]) -> T:
    """Return the result of the handler. Cancel the handler and raise `ClientLeft` if the client disconnects first."""
    running = asyncio.ensure_future(handler)
    leaving = asyncio.ensure_future(request.disconnected())
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientLeft
        return running.result()
    finally:
        leaving.cancel()
        if not running.done():
            running.cancel()
            await asyncio.wait({running})
