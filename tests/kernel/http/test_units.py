"""Handlers as units of work, with the numbers of the rules in docs/concepts/unit-of-work.md."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import peewee
import pytest

from corral.auth.principal import PUBLIC
from corral.database.engine import Work
from corral.database.model import SHARED, Model
from corral.database.unit import current, in_unit
from corral.errors import Conflict, NoUnit
from corral.http.answers import Stream
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit


class Step(Model):
    """What a handler has done."""

    visibility = SHARED
    name = peewee.CharField(primary_key=True)
    unit = peewee.BigIntegerField()

    class Meta:
        table_name = "steps_steps"


routes = Routes("/steps", tag="Steps")


def step(name: str) -> str:
    """Write a row with the name, and an identifier of the unit that wrote it."""
    Step.create(name=name, unit=id(current()))
    return name


@routes.post("/two", needs=PUBLIC)
def write_two() -> dict[str, bool]:
    """Write two rows."""
    first = current()
    step("one")
    step("two")
    return {"same": first is current()}


@routes.post("/half", needs=PUBLIC, raises=("conflict",))
def write_half() -> dict[str, bool]:
    """Write a row and fail."""
    step("half")
    raise Conflict("no")


@routes.get("/sly", needs=PUBLIC)
def write_in_a_read() -> dict[str, bool]:
    """Write where one may only read."""
    step("sly")
    return {}


@routes.post("/apart", needs=PUBLIC)
async def write_apart(work: Work) -> dict[str, Any]:
    """Write in units of its own, and wait between them."""
    told = [in_unit()]
    with pytest.raises(NoUnit):
        step("outside")
    await work(lambda: step("before"))
    await asyncio.sleep(0)
    told.append(in_unit())
    await work(lambda: step("after"))
    return {"in_unit": told}


@routes.post("/stream", needs=PUBLIC)
async def write_and_stream(work: Work) -> Stream:
    """Write before the first byte, and after the last, whether or not the client is there."""
    await work(lambda: step("first"))

    async def parts() -> AsyncIterator[bytes]:
        try:
            for number in range(1000):
                yield b"part %d\n" % number
                await asyncio.sleep(0.01)
        finally:
            await asyncio.shield(work(lambda: step("last")))

    return Stream(parts(), media_type="text/plain")


class StepsPlugin(Plugin):
    """Routes that write."""

    name = "steps"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]

    @hookimpl
    def corral_models(self) -> Iterable[type[Model]]:
        return [Step]


@pytest.fixture
async def kit(make_kit: Callable[..., Any]) -> Kit:
    made: Kit = await make_kit(plugins=[StepsPlugin])
    assert made.loaded("steps").state == "active", made.loaded("steps").reason
    await made.work(lambda: current().database.engine.create_tables([Step]))
    return made


async def steps(kit: Kit) -> list[str]:
    return await kit.work(lambda: sorted(row.name for row in Step.select()), read=True)


async def test_unit_of_work_1_a_def_handler_is_one_unit(kit: Kit) -> None:
    assert (await kit.client.post("/steps/two")).json() == {"same": True}
    assert (await kit.client.post("/steps/half")).status == 409
    assert await steps(kit) == ["one", "two"]


async def test_unit_of_work_1_a_get_reads_only(kit: Kit) -> None:
    for _ in range(30):  # after 20 short reads, SQLite would read on the event loop
        assert (await kit.client.get("/steps/sly")).status == 500
    assert await steps(kit) == []


async def test_unit_of_work_1_an_async_handler_has_only_the_units_that_it_opens(kit: Kit) -> None:
    assert (await kit.client.post("/steps/apart")).json() == {"in_unit": [False, False]}
    assert await steps(kit) == ["after", "before"]


async def test_unit_of_work_13_a_stream_starts_after_its_first_unit_and_the_last_always_runs(kit: Kit) -> None:
    began = asyncio.Event()
    seen: list[str] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.extend(await steps(kit))
            began.set()

    async def receive() -> Any:
        if not began.is_set():
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    scope: Any = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/api/v1/steps/stream",
        "raw_path": b"/api/v1/steps/stream",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", b"0")],
        "client": ("127.0.0.1", 1),
    }
    async with asyncio.timeout(60):
        await kit.application.app(scope, receive, send)
        while await steps(kit) != ["first", "last"]:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.02)
    assert seen == ["first"]
