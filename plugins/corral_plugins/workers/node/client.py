"""The HTTP client of workers and agent loops: one small method a call, retries only where a repeat does no harm."""

from __future__ import annotations

import asyncio
import random
import socket
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import httpx2
import msgspec

BASE = "/api/v1"
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
POLL_SLACK_SECONDS = 15.0
TOOL_SECONDS = 700.0  # the server ends a tool before
OUTCOME_SECONDS = 50
# Only these refusals say nothing about the call itself.
SHORTLY = ("idempotency_in_progress", "overloaded", "shutting_down")
# A connection that died silently is noticed by the system while a long answer is awaited.
KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):
    KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]


T = TypeVar("T")


class Unreachable(Exception):
    """No answer came: the server is not there, or the connection broke."""


class Cut(Unreachable):
    """The server was reached, but no whole answer came: what was asked may have been done, and paid."""


class ApiError(Exception):
    """The server refused. `code` is stable; `members` is the whole problem document.

    `is_foreign`: what answered is not the API but a proxy before it, or another program at this address.
    """

    def __init__(self, status: int, members: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status, self.members, self.retry_after = status, members, retry_after
        self.is_foreign = not members.get("code")
        self.code = str(members.get("code") or f"http_{status}")
        self.detail = str(members.get("detail") or f"HTTP {status}, and not from this API: is the URL right?")
        super().__init__(f"{self.status} {self.code}: {self.detail}")

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed a little later."""
        away = self.is_foreign and (self.status < 400 or self.status in (401, 404))  # no server behind the proxy now
        return away or self.status in (429, 500, 502, 503, 504) or self.code == "idempotency_in_progress"


def pause(tries: int, error: Exception | None = None) -> float:
    """Seconds before the next try: doubling, with jitter, never less than the server asked for."""
    wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10)) * (0.75 + random.random() / 2)  # noqa: S311
    asked = error.retry_after if isinstance(error, ApiError) else None
    return float(max(wait, min(asked or 0.0, 60.0)))


def refusal(answer: httpx2.Response) -> ApiError:
    """The error that an answer is."""
    return ApiError(answer.status_code, _object(answer) or {}, _retry_after(answer))


def is_final(error: ApiError) -> bool:
    """Whether a refusal by the API itself is about the call, so that repeating it is no use; a proxy's says nothing."""
    return error.code not in SHORTLY and not error.is_foreign


async def insist(
    call: Callable[[], Awaitable[T]], *, tries: int | None = None, unless: Callable[[ApiError], bool] | None = None
) -> T:
    """Call, again while it fails in a way that passes; `tries` None: until the caller is cancelled."""
    done = 0
    while True:
        try:
            return await call()
        except (Unreachable, ApiError) as error:
            done += 1
            if isinstance(error, ApiError) and (not error.passing or (unless is not None and unless(error))):
                raise
            if tries is not None and done >= tries:
                raise
            await asyncio.sleep(pause(done, error))


class Client:
    """Calls one server with one credential; methods raise `ApiError` or `Unreachable`. No redirect is followed."""

    def __init__(self, url: str, token: str, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.url, self.token = url.rstrip("/"), token
        if transport is None and _is_direct(self.url):
            transport = httpx2.AsyncHTTPTransport(socket_options=KEEP_ALIVE)
        self.http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            transport=transport,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        seconds: float = READ_SECONDS,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One request; the parsed answer."""
        sent = {"Content-Type": "application/json", **(headers or {})} if body is not None else dict(headers or {})
        try:
            answer = await self.http.request(
                method,
                f"{self.url}{BASE}{path}",
                content=None if body is None else msgspec.json.encode(body),
                headers=sent,
                params=query,
                timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS),
            )
        except httpx2.HTTPError as error:
            raise Unreachable(f"{self.url}: {type(error).__name__}: {error}") from None
        if answer.status_code in (200, 201, 202) and (found := _object(answer)) is not None:
            return found
        raise refusal(answer)

    # -- as a worker

    async def register(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """With a registration key or a member's token; the answer shows the worker's own token once."""
        return await self.call("POST", "/workers/register", facts)

    async def heartbeat(self, worker_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Tell figures and leases; renews those that are listed."""
        return await self.call("POST", f"/workers/{worker_id}/heartbeat", body, seconds=10.0)

    async def claim(self, worker_id: str, *, max_tasks: int, wait_seconds: int) -> dict[str, Any]:
        """Ask for work and wait for it."""
        body = {"max_tasks": max_tasks, "wait_seconds": wait_seconds}
        path = f"/workers/{worker_id}/claim"
        return await self.call("POST", path, body, seconds=wait_seconds + POLL_SLACK_SECONDS)

    async def signals(self, worker_id: str, *, after: int, wait: int) -> dict[str, Any]:
        """Wait for something that must be heard at once."""
        path, query = f"/workers/{worker_id}/signals", {"after": after, "wait": wait}
        return await self.call("GET", path, query=query, seconds=wait + POLL_SLACK_SECONDS)

    # -- about a task, under a lease; an attempt token needs no `lease`

    async def start(self, task_id: str, lease: str) -> dict[str, Any]:
        """The attempt begins."""
        return await self._task(task_id, "start", {}, lease, tries=3)

    async def progress(self, task_id: str, body: Mapping[str, Any], *, tries: int | None = None) -> dict[str, Any]:
        """Tell how far it is; the answer has the lease's `state`."""
        return await self._task(task_id, "progress", body, tries=tries)

    async def logs(self, task_id: str, entries: list[dict[str, Any]]) -> None:
        """Append lines; repeating is harmless."""
        await self._task(task_id, "logs", {"entries": entries}, tries=3)

    async def checkpoint(self, task_id: str, step: int, state: Mapping[str, Any]) -> None:
        """Keep what the next attempt begins with."""
        await self._task(task_id, "checkpoint", {"step": step, "state": state})

    async def complete(self, task_id: str, result: Any) -> None:
        """The work is done."""
        await self._task(task_id, "complete", {"result": result})

    async def fail(
        self,
        task_id: str,
        kind: str,
        message: str,
        *,
        retryable: bool,
        lease: str | None = None,
        tries: int | None = None,
    ) -> None:
        """The work failed."""
        body = {"error": {"type": kind, "message": message[:4000]}, "retryable": retryable}
        await self._task(task_id, "fail", body, lease, tries=tries)

    async def wait(self, task_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Give the lease back until a decision or an input is there."""
        return await self._task(task_id, "wait", body)

    async def release(self, task_id: str, reason: str, *, lease: str | None = None, tries: int | None = None) -> None:
        """Give the task back; no attempt is used."""
        await self._task(task_id, "release", {"reason": reason}, lease, tries=tries)

    async def cancelled(self, task_id: str, lease: str) -> None:
        """The run has been ended as asked."""
        await self._task(task_id, "cancelled", {}, lease, tries=5)

    async def tool(self, task_id: str, name: str, call_id: str, arguments: Any) -> dict[str, Any]:
        """Have a tool called; what refuses it is told to the model. Repeats run nothing twice, by `call_id`."""
        path = f"tools/{urllib.parse.quote(name, safe='')}"
        body = {"call_id": call_id, "arguments": arguments}
        return await self._task(task_id, path, body, unless=is_final, seconds=TOOL_SECONDS)

    async def tool_outcome(self, task_id: str, call_id: str) -> dict[str, Any]:
        """A call that was made before; waits a while for one that still runs."""
        path = f"/tasks/{task_id}/tools/calls/{urllib.parse.quote(call_id, safe='')}"
        options: dict[str, Any] = {"query": {"wait": OUTCOME_SECONDS}, "seconds": OUTCOME_SECONDS + POLL_SLACK_SECONDS}
        return await insist(lambda: self.call("GET", path, **options), unless=is_final)

    async def tool_result(self, task_id: str, call_id: str, body: Mapping[str, Any]) -> None:
        """Tell how a tool went that ran here."""
        await self._task(task_id, f"tools/calls/{urllib.parse.quote(call_id, safe='')}/result", body, unless=is_final)

    async def _task(
        self,
        task_id: str,
        call: str,
        body: Mapping[str, Any],
        lease: str | None = None,
        *,
        tries: int | None = None,
        unless: Callable[[ApiError], bool] | None = None,
        seconds: float = READ_SECONDS,
    ) -> dict[str, Any]:
        headers = {"Corral-Lease": lease} if lease is not None else None
        path = f"/tasks/{task_id}/{call}"
        return await insist(
            lambda: self.call("POST", path, body, headers=headers, seconds=seconds), tries=tries, unless=unless
        )


def _is_direct(url: str) -> bool:
    """Whether no proxy of the environment is to be asked, which giving a transport says: never over loopback."""
    parts = urllib.parse.urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies()
    if host in ("localhost", "::1") or host.startswith("127.") or not {parts.scheme, "all"} & proxies.keys():
        return True
    return bool(urllib.request.proxy_bypass(host))


def _object(answer: httpx2.Response) -> dict[str, Any] | None:
    """The answer, if it is a JSON object: the API answers nothing else."""
    try:
        return msgspec.json.decode(answer.content, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


def _retry_after(answer: httpx2.Response) -> float | None:
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
