"""S13: many viewers of every role, each with what it may see, while events of every class and owner are written.

Short form: 40 viewers and 1,500 events; long form (`--long`): 200 viewers and 100,000 events. Half of the viewers
follow by `/ws`, half by server-sent events. Each must receive exactly the events that it may read.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.plugins.realtime.conftest import EmitterPlugin, Guarded, Happened, Whispered, ear, sse

from corral.events.event import Event, emit
from corral.testing.kit import Client, Kit
from corral.testing.server import serving

pytestmark = pytest.mark.one_engine

BATCH = 100  # events; every viewer has them before the next are written, so that none is too slow
CONNECTIONS_PER_USER = 8
KINDS: tuple[type[Any], ...] = (Happened, Whispered, Guarded)


class Viewer:
    """One connection of a person, and what came through it."""

    def __init__(self, person: Client, role: str) -> None:
        self.person, self.role, self.id = person, role, person.user["id"]
        self.seen: list[int] = []
        self.wrong: list[str] = []
        self.marks = asyncio.Condition()
        self.mark = -1

    def may_read(self, kind: str, owner: str) -> bool:
        """Whether the person may read this event, as the contract says."""
        return (
            kind == "happened"
            or (kind == "whispered" and owner == self.id)
            or (kind == "guarded" and self.role == "admin")
        )

    async def follow_socket(self, port: int, began: asyncio.Event) -> None:
        async with ear(port, self.person) as socket:
            await socket.say("subscribe", event="emitter.*")
            assert (await socket.hear())["type"] == "subscribed"
            began.set()
            async for message in socket.socket:
                frame = json.loads(message)
                await self._take(frame["type"], frame.get("event", ""), frame.get("data"))

    async def follow_stream(self, port: int, began: asyncio.Event) -> None:
        async with sse(port, self.person, "types=emitter.*") as stream:
            await stream.begin()
            began.set()
            async for _, name, frame in stream:
                await self._take("event", name, frame["data"])

    async def _take(self, type: str, name: str, data: Any) -> None:
        if type != "event":
            self.wrong.append(type)
        elif data["number"] < 0:  # the mark at the end of a batch
            async with self.marks:
                self.mark = -data["number"]
                self.marks.notify_all()
        else:
            self.seen.append(data["number"])

    async def reached(self, mark: int) -> None:
        async with self.marks, asyncio.timeout(60):
            await self.marks.wait_for(lambda: self.mark >= mark)


async def people(kit: Kit, viewers: int) -> list[Viewer]:
    """Viewers of every role that may follow events, a few connections for each person."""
    roles = ("admin", "member", "member", "viewer")
    found: list[Viewer] = []
    while len(found) < viewers:
        role = roles[(len(found) // CONNECTIONS_PER_USER) % len(roles)]
        person = await kit.as_user(role, f"viewer-{len(found)}@example.org")
        found += [Viewer(person, role) for _ in range(CONNECTIONS_PER_USER)]
    return found[:viewers]


async def test_s13_viewers_see_exactly_what_they_may_read(
    make_kit: Callable[..., Any], long_form: bool, figure: Any
) -> None:
    random.seed(13)
    count, events = (200, 100_000) if long_form else (40, 1_500)
    config = {"settings.security.access_ttl_seconds": 3600}
    kit: Kit = await make_kit(plugins=["realtime", EmitterPlugin], config=config)
    viewers = await people(kit, count)
    owners = sorted({viewer.id for viewer in viewers})
    written: list[tuple[str, str]] = []

    def write(batch: list[tuple[type[Any], str]], mark: int) -> None:
        for number, (kind, owner) in enumerate(batch, len(written)):
            event: Event = kind(number=number)
            emit(event, object=("thing", str(number)), owner=owner)
        emit(Happened(number=-mark), object=("mark", str(mark)), owner=None)

    async with serving(kit) as port:
        began = [asyncio.Event() for _ in viewers]
        following = [
            asyncio.create_task(viewer.follow_socket(port, start) if n % 2 else viewer.follow_stream(port, start))
            for n, (viewer, start) in enumerate(zip(viewers, began, strict=True))
        ]
        async with asyncio.timeout(60):
            await asyncio.gather(*(start.wait() for start in began))
        for mark in range(1, events // BATCH + 1):
            batch = [(random.choice(KINDS), random.choice(owners)) for _ in range(BATCH)]
            await kit.kernel.database.work(functools.partial(write, batch, mark))
            written += [(kind.event.partition(".")[2], owner) for kind, owner in batch]
            await asyncio.gather(*(viewer.reached(mark) for viewer in viewers))
        for task in following:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*following, return_exceptions=True)
    figures = Counter[str]()
    for viewer in viewers:
        readable = [number for number, (kind, owner) in enumerate(written) if viewer.may_read(kind, owner)]
        assert viewer.seen == readable, f"{viewer.role}: {set(viewer.seen) ^ {*readable}}"
        assert viewer.wrong == []
        figures["frames"] += len(viewer.seen)
        figures["withheld"] += len(written) - len(readable)
    assert figures["withheld"] > len(written)
    figure("S13", {"viewers": count, "events": len(written), **figures, "unreadable": 0})
