"""Handlers that open their own units: the time they may take, the client's leaving, the key of a repeatable call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from corral.asgi.call import Call, Gone, Reply
from corral.asgi.endpoint import Endpoint
from corral.asgi.views import render
from corral.database.engine import Database
from corral.database.unit import Entry
from corral.errors import Unavailable
from corral.http.idempotency import RENEW_SECONDS, Idempotency, Keyed, Stored

T = TypeVar("T")

KEPT_STREAM = 4 * 1024 * 1024


class OwnUnits:
    """Runs `async def` handlers. A key is in flight as long as its handler runs, and free soon after a crash."""

    def __init__(self, database: Database, idempotency: Idempotency) -> None:
        self._database, self._idempotency = database, idempotency

    async def run(
        self, call: Call, endpoint: Endpoint, arguments: dict[str, Any], keyed: Keyed | None, entry: Entry
    ) -> Reply:
        """The handler's answer, or the stored one of its key."""
        if keyed is None:
            return await _handle(call, endpoint, arguments)
        stored = await self._database.work(lambda: self._idempotency.begin(keyed), entry=entry)
        if stored is not None:
            return replay(stored)
        held = _Held(self._database, self._idempotency, keyed, entry, secret=endpoint.route.no_store)
        try:
            reply = await _handle(call, endpoint, arguments)
            if reply.chunks is None:
                await held.keep(Stored(reply.status, reply.headers, reply.body))
        except BaseException:
            await held.forget()
            raise
        if reply.chunks is not None:
            reply.chunks = _kept(reply.chunks, reply, held)
        return reply


class _Held:
    """A key that is in flight, renewed until it is kept or forgotten."""

    def __init__(
        self, database: Database, idempotency: Idempotency, keyed: Keyed, entry: Entry, *, secret: bool
    ) -> None:
        self._database, self._idempotency, self._keyed, self._entry = database, idempotency, keyed, entry
        self._secret = secret
        self._renewing = asyncio.ensure_future(self._renew())

    async def keep(self, answer: Stored) -> None:
        """Store the answer."""
        self._renewing.cancel()
        await self._database.work(
            lambda: self._idempotency.finish(self._keyed, answer, secret=self._secret), entry=self._entry
        )

    async def forget(self) -> None:
        """Free the key; also of a caller that is being cancelled."""
        self._renewing.cancel()
        await asyncio.shield(self._database.work(lambda: self._idempotency.forget(self._keyed), entry=self._entry))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            await self._database.work(lambda: self._idempotency.renew(self._keyed), entry=self._entry)


async def _kept(chunks: Any, reply: Reply, held: _Held) -> AsyncIterator[bytes]:
    """The stream; once it was sent as a whole it is stored, and replayed as it was. One that was cut frees its key."""
    parts: list[bytes] = []
    size, ended = 0, False
    try:
        async for chunk in chunks:
            size += len(chunk)
            if size <= KEPT_STREAM:
                parts.append(chunk)
            yield chunk
        ended = True
    finally:
        await chunks.aclose()
        if ended and reply.is_whole() and size <= KEPT_STREAM:
            headers = {**reply.headers, "Content-Type": reply.media_type.decode()}
            await held.keep(Stored(reply.status, headers, b"".join(parts)))
        else:
            await held.forget()


async def _handle(call: Call, endpoint: Endpoint, arguments: dict[str, Any]) -> Reply:
    seconds = endpoint.route.seconds
    try:
        async with asyncio.timeout(seconds):
            working = endpoint.handler(**arguments)
            return render(await (_while_there(call, working) if endpoint.route.abandoned else working), endpoint, call)
    except TimeoutError:
        raise Unavailable(f"This took longer than {seconds:g} seconds.", code="overloaded") from None


async def _while_there(call: Call, handler: Coroutine[Any, Any, T]) -> T:
    """What the handler returns; it is cancelled when the client leaves, since nobody waits for the answer."""
    working = asyncio.ensure_future(handler)
    leaving = asyncio.ensure_future(call.left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


def replay(stored: Stored) -> Reply:
    """A stored answer; of a stream it is the whole at once."""
    headers = {**stored.headers, "Idempotency-Replayed": "true"}
    media_type = headers.pop("Content-Type", "application/json")
    return Reply(stored.status, stored.body, headers, media_type.encode())
