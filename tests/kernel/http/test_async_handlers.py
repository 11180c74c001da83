"""Handlers with several units: clients that leave, keys of long calls and streams; and names that take slashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, ClassVar

import msgspec
import pytest

from corral import clock
from corral.auth.principal import PUBLIC
from corral.errors import Problem
from corral.http import idempotency
from corral.http.answers import Request, Stream
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl
from corral.testing.kit import Kit

pytestmark = pytest.mark.one_engine


def explain(problem: Problem, request: Request | None) -> None:
    problem.status = 400 if problem.status == 422 else problem.status
    problem.members["error"] = {"code": problem.code}


routes = Routes("/lab", tag="Lab", explain=explain)


class Seen:
    """What the handlers did."""

    began = asyncio.Event()
    ended: ClassVar[list[str]] = []
    runs = 0


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    seconds: float = 60.0


async def _sleep(body: Body) -> Body:
    Seen.runs += 1
    Seen.began.set()
    try:
        await asyncio.sleep(body.seconds)
        Seen.ended.append("whole")
    except asyncio.CancelledError:
        Seen.ended.append("cut")
        raise
    return body


@routes.post("/sleep", needs=PUBLIC, abandoned=True)
async def sleep_while_there(body: Body) -> Body:
    """Sleep while somebody waits for it."""
    return await _sleep(body)


@routes.post("/insist", needs=PUBLIC)
async def sleep_anyway(body: Body) -> Body:
    """Sleep whoever waits."""
    return await _sleep(body)


@routes.post("/stream", needs=PUBLIC)
async def stream_parts(body: Body) -> Stream:
    """Stream three parts; `seconds` 1: the answer is not whole."""
    Seen.runs += 1

    async def parts() -> AsyncIterator[bytes]:
        for part in (b"one ", b"two ", b"three"):
            yield part
            await asyncio.sleep(0)

    return Stream(parts(), media_type="text/plain", is_whole=lambda: body.seconds != 1)


@routes.get("/named/{name}", needs=PUBLIC, rest=True)
def read_named(name: str) -> dict[str, str]:
    """Say the name."""
    return {"name": name}


class LabPlugin(Plugin):
    """Handlers that take their time."""

    name = "lab"

    @hookimpl
    def corral_routes(self) -> Iterable[Routes]:
        return [routes]


@pytest.fixture(params=[True, False], ids=["table", "quart"])
async def kit(make_kit: Callable[..., Any], request: pytest.FixtureRequest) -> Kit:
    Seen.began, Seen.runs = asyncio.Event(), 0
    Seen.ended.clear()
    made: Kit = await make_kit(plugins=[LabPlugin], config={"server.fast_dispatch": request.param})
    return made


async def post_and_leave(kit: Kit, path: str) -> None:
    """A client that sends a request and leaves while it is being served."""
    sent = asyncio.Event()

    async def receive() -> Any:
        if not sent.is_set():
            sent.set()
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await Seen.began.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"2")]
    scope: Any = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": f"/api/v1{path}",
        "raw_path": f"/api/v1{path}".encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 5000),
        "server": ("localhost", 80),
        "extensions": {},
    }
    await asyncio.wait_for(kit.application.app(scope, receive, send), 5)


async def test_a_handler_that_may_be_abandoned_ends_with_its_client(kit: Kit) -> None:
    await post_and_leave(kit, "/lab/sleep")
    assert Seen.ended == ["cut"]


async def test_a_handler_that_is_answered_in_time_is_not_cut(kit: Kit) -> None:
    answer = await kit.client.post("/lab/sleep", {"seconds": 0.05})
    assert (answer.status, Seen.ended) == (200, ["whole"])


async def test_a_key_stays_in_flight_as_long_as_its_handler_runs(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.asgi.async_handlers.RENEW_SECONDS", 0.05)
    key = {"Idempotency-Key": "k"}
    first = asyncio.create_task(kit.client.post("/lab/insist", {"seconds": 1}, headers=key))
    await Seen.began.wait()
    clock.travel(idempotency.IN_FLIGHT_SECONDS + 1)
    await asyncio.sleep(0.3)  # renewed meanwhile
    again = await kit.client.post("/lab/insist", {"seconds": 1}, headers=key)
    assert (again.status, again.code) == (409, "idempotency_in_progress")
    assert (await first).status == 200
    assert (await kit.client.post("/lab/insist", {"seconds": 1}, headers=key)).headers["idempotency-replayed"] == "true"
    assert Seen.runs == 1


async def test_a_keyed_stream_is_replayed_as_it_was(kit: Kit) -> None:
    key = {"Idempotency-Key": "s"}
    first = await kit.client.post("/lab/stream", {}, headers=key)
    again = await kit.client.post("/lab/stream", {}, headers=key)
    assert (again.body, again.headers["content-type"]) == (first.body, "text/plain") == (b"one two three", "text/plain")
    assert again.headers["idempotency-replayed"] == "true"
    assert Seen.runs == 1


async def test_a_stream_that_is_not_whole_frees_its_key(kit: Kit) -> None:
    key = {"Idempotency-Key": "p"}
    for _ in range(2):
        assert "idempotency-replayed" not in (await kit.client.post("/lab/stream", {"seconds": 1}, headers=key)).headers
    assert Seen.runs == 2


@pytest.mark.parametrize(
    ("path", "name"),
    [("/lab/named/a", "a"), ("/lab/named/a/b", "a/b"), ("/lab/named/a%2Fb%2fc", "a/b/c"), ("/lab/named/a/b/", "a/b")],
)
async def test_a_name_may_take_the_rest_of_the_path(kit: Kit, path: str, name: str) -> None:
    answer = await kit.client.get(path)
    assert (answer.status, answer.json().get("name")) == (200, name)


@pytest.mark.parametrize("path", ["/lab/named/", "/lab/named/a//b", "/lab/named/a/../b", "/lab/named/%2e%2e/b"])
async def test_a_rest_is_not_crooked(kit: Kit, path: str) -> None:
    assert (await kit.client.get(path)).status == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/lab/sleep", 400, "validation_error"),
        ("GET", "/lab/nowhere", 404, "not_found"),
        ("GET", "/lab", 404, "not_found"),
        ("DELETE", "/lab/sleep", 405, "method_not_allowed"),
    ],
)
async def test_problems_below_the_prefix_of_a_group_are_completed(
    kit: Kit, method: str, path: str, status: int, code: str
) -> None:
    answer = await kit.client.request(method, path, {"surprise": 1})
    assert (answer.status, answer.json()["status"], answer.json()["error"]) == (status, status, {"code": code})


@pytest.mark.parametrize("path", ["/labs", "/nowhere", "/"])
async def test_problems_of_other_paths_are_not_completed(kit: Kit, path: str) -> None:
    assert "error" not in (await kit.client.get(path)).json()
