"""Runs `async def` handlers, which open their own units of work.

This module also applies time limits and idempotency keys, and cancels a handler when its client disconnects.
"""

from __future__ import annotations

import asyncio
import functools

from corral.asgi.endpoint import Endpoint
from corral.asgi.request import IncomingRequest, run_until_client_leaves
from corral.asgi.response import render
from corral.asgi.streams import record_stream
from corral.database.engine import Database
from corral.database.unit import UnitContext
from corral.errors import Unavailable
from corral.http.answers import Response
from corral.http.idempotency import RENEW_SECONDS, Idempotency, IdempotencyKey


class AsyncHandlers:
    """Runs `async def` handlers.

    The idempotency key of a request is marked as in flight while the handler is running. After a crash, the key can be
    used again after at most `IN_FLIGHT_SECONDS`.
    """

    def __init__(self, database: Database, idempotency: Idempotency) -> None:
        self._database, self._idempotency = database, idempotency

    async def run(self, request: IncomingRequest, endpoint: Endpoint) -> Response:
        """Run the handler and return its response, or return the response stored under the idempotency key."""
        key = request.idempotency_key
        if key is None:
            return await _handle(request, endpoint)
        entry = request.unit_context(request.principal)
        stored = await self._database.work(lambda: self._idempotency.claim_key(key), entry=entry)
        return stored or await self._handle_keyed(request, endpoint, key, entry)

    async def _handle_keyed(
        self, request: IncomingRequest, endpoint: Endpoint, key: IdempotencyKey, entry: UnitContext
    ) -> Response:
        renewing = asyncio.ensure_future(self._renew(key, entry))

        async def store_or_release_key(response: Response | None, body: bytes | None) -> None:
            """Store the response under the idempotency key, or release the key if the response is incomplete."""
            renewing.cancel()
            if response is None or body is None or not response.is_whole():
                unit = functools.partial(self._idempotency.release_key, key)
            else:
                secret = endpoint.route.no_store
                unit = functools.partial(self._idempotency.store_response, key, response, body, secret=secret)
            await asyncio.shield(self._database.work(unit, entry=entry))  # the task of this request may be cancelled

        try:
            response = await _handle(request, endpoint)
            if response.chunks is None:
                await store_or_release_key(response, response.body)
            else:
                response.chunks = record_stream(response.chunks, functools.partial(store_or_release_key, response))
        except BaseException:
            await store_or_release_key(None, None)
            raise
        return response

    async def _renew(self, key: IdempotencyKey, entry: UnitContext) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            await self._database.work(lambda: self._idempotency.renew_key(key), entry=entry)


async def _handle(request: IncomingRequest, endpoint: Endpoint) -> Response:
    seconds = endpoint.route.seconds
    try:
        async with asyncio.timeout(seconds):
            running = endpoint.handler(**request.arguments)
            if endpoint.route.abandoned:
                running = run_until_client_leaves(running, asyncio.ensure_future(request.disconnected()))
            return render(await running, endpoint, request)
    except TimeoutError:
        raise Unavailable(f"The operation took more than {seconds:g} seconds; try again.", code="overloaded") from None
