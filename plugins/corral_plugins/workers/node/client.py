"""The HTTP client of workers and agent loops. It retries only calls that are safe to repeat."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import httpx2
import msgspec

BASE = "/api/v1"
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
FIRST_PAUSE, MAX_PAUSE = 0.25, 10.0
POLL_SLACK_SECONDS = 15.0
TOOL_SECONDS = 700.0  # longer than the time limit of tools on the server
OUTCOME_SECONDS = 50
# Error codes that are not about the call itself, so that the call may be repeated.
TEMPORARY = ("idempotency_in_progress", "overloaded", "shutting_down")
# Error codes for which the task is released without using an attempt, because waiting helps.
RELEASE_CODES = ("circuit_open", "kill_switch")
# Socket options with which the system detects a dead connection while the client waits for a response.
KEEP_ALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
if hasattr(socket, "TCP_KEEPIDLE"):
    KEEP_ALIVE += [
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]


T = TypeVar("T")


class ServerUnreachable(Exception):
    """Raised if a request received no response because the server is not running or the connection failed."""


class IncompleteResponse(ServerUnreachable):
    """Raised if a response is incomplete. The server may already have processed and billed the request."""


class ApiError(Exception):
    """Raised if the server refused a call.

    `code` is the stable error code. `members` contains all fields of the problem document. If `is_foreign` is true, the
    response did not come from the API, but from a proxy or another program at the server's address.
    """

    def __init__(self, status: int, members: Mapping[str, Any], retry_after: float | None = None) -> None:
        self.status, self.members, self.retry_after = status, members, retry_after
        self.is_foreign = not members.get("code")
        self.code = str(members.get("code") or f"http_{status}")
        self.detail = str(
            members.get("detail") or f"HTTP {status}, but the response is not from the Corral API; check the URL."
        )
        super().__init__(f"{self.status} {self.code}: {self.detail}")

    @property
    def is_temporary(self) -> bool:
        """Whether the same call may succeed if it is repeated later."""
        no_server = self.is_foreign and (self.status < 400 or self.status in (401, 404))  # only a proxy responded
        return no_server or self.status in (429, 500, 502, 503, 504) or self.code == "idempotency_in_progress"

    @property
    def is_lease_lost(self) -> bool:
        """Whether the error means that the lease has ended, its token was revoked, or the task was deleted."""
        return self.code in ("lease_lost", "task_terminal") or (self.status == 401 and not self.is_foreign)


class WorkerLeaseLost(Exception):
    """Raised if the lease has ended. The attempt must stop without reporting an outcome."""


class CancelRequested(Exception):
    """Raised if the task is being cancelled. The attempt must stop; the worker acknowledges the cancellation."""


def raise_for_lease_state(reply: Mapping[str, Any]) -> None:
    """Raise `WorkerLeaseLost` or `CancelRequested` according to the lease state in a response."""
    if reply.get("state") == "lost":
        raise WorkerLeaseLost
    if reply.get("state") == "cancel_requested":
        raise CancelRequested


def retry_delay(tries: int, error: Exception | None = None) -> float:
    """Return the number of seconds to wait before the next try.

    The delay doubles with each try, up to 10 s, with jitter. If the server sent `Retry-After`, the delay is at least
    that long, but at most 60 s.
    """
    wait = min(MAX_PAUSE, FIRST_PAUSE * 2 ** min(tries, 10)) * (0.75 + random.random() / 2)  # noqa: S311
    asked = error.retry_after if isinstance(error, ApiError) else None
    return float(max(wait, min(asked or 0.0, 60.0)))


def error_of_response(response: httpx2.Response) -> ApiError:
    """Convert an error response into an `ApiError`."""
    return ApiError(response.status_code, _json_object(response) or {}, _retry_after(response))


def is_final_response(error: ApiError) -> bool:
    """Return whether a retry is pointless because the call was refused by the API itself rather than by a proxy."""
    return error.code not in TEMPORARY and not error.is_foreign


async def call_with_retries(
    call: Callable[[], Awaitable[T]], *, tries: int | None = None, unless: Callable[[ApiError], bool] | None = None
) -> T:
    """Make a call, and repeat it after temporary failures.

    `tries` is the maximum number of calls. If it is None, the call is repeated until the caller is cancelled. `unless`
    is a function that returns True for errors after which the call must not be repeated.
    """
    failures = 0
    while True:
        try:
            return await call()
        except (ServerUnreachable, ApiError) as error:
            failures += 1
            if isinstance(error, ApiError) and (not error.is_temporary or (unless is not None and unless(error))):
                raise
            if tries is not None and failures >= tries:
                raise
            await asyncio.sleep(retry_delay(failures, error))


class WorkerApiClient:
    """A client for one server with one set of credentials.

    The methods raise `ApiError` or `ServerUnreachable`. Redirects are not followed.
    """

    def __init__(self, url: str, token: str, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.url, self.token = url.rstrip("/"), token
        verify = _trusted_authorities(self.url)
        if transport is None and _is_direct(self.url):
            transport = httpx2.AsyncHTTPTransport(verify=verify, socket_options=KEEP_ALIVE)
        self.http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            transport=transport,
            verify=verify,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close the connections to the server."""
        await self.http.aclose()

    async def send_request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        seconds: float = READ_SECONDS,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Send one request and return the parsed response."""
        sent = {"Content-Type": "application/json", **(headers or {})} if body is not None else dict(headers or {})
        try:
            response = await self.http.request(
                method,
                f"{self.url}{BASE}{path}",
                content=None if body is None else msgspec.json.encode(body),
                headers=sent,
                params=query,
                timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS),
            )
        except httpx2.HTTPError as error:
            raise ServerUnreachable(f"{self.url} does not answer: {str(error) or type(error).__name__}") from None
        if response.status_code in (200, 201, 202) and (parsed := _json_object(response)) is not None:
            return parsed
        raise error_of_response(response)

    # -- calls of a worker, with the token of the worker

    async def register_worker(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Register a worker with a registration key or a member's token.

        The response contains the worker's token, which is shown only once.
        """
        return await self.send_request("POST", "/workers/register", facts)

    async def send_heartbeat(self, worker_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Report the resource usage and the leases of a worker. The server renews the listed leases."""
        return await self.send_request("POST", f"/workers/{worker_id}/heartbeat", body, seconds=10.0)

    async def claim_tasks(self, worker_id: str, *, max_tasks: int, wait_seconds: int) -> dict[str, Any]:
        """Claim tasks. If no task can be claimed, wait up to `wait_seconds` for one."""
        body = {"max_tasks": max_tasks, "wait_seconds": wait_seconds}
        path = f"/workers/{worker_id}/claim"
        return await self.send_request("POST", path, body, seconds=wait_seconds + POLL_SLACK_SECONDS)

    async def wait_for_signals(self, worker_id: str, *, after: int, wait: int) -> dict[str, Any]:
        """Wait up to `wait` seconds for commands and for signals about leases."""
        path, query = f"/workers/{worker_id}/signals", {"after": after, "wait": wait}
        return await self.send_request("GET", path, query=query, seconds=wait + POLL_SLACK_SECONDS)

    # -- calls about a task, under a lease. With an attempt token, `lease` is not needed.

    async def start_task(self, task_id: str, lease: str) -> dict[str, Any]:
        """Start the attempt of a claimed task."""
        return await self._post_task_call(task_id, "start", {}, lease, tries=3)

    async def report_progress(
        self, task_id: str, body: Mapping[str, Any], *, tries: int | None = None
    ) -> dict[str, Any]:
        """Report progress. The response contains the `state` of the lease."""
        return await self._post_task_call(task_id, "progress", body, tries=tries)

    async def append_logs(self, task_id: str, entries: list[dict[str, Any]]) -> None:
        """Append entries to the log of the task."""
        await self._post_task_call(task_id, "logs", {"entries": entries}, tries=3)

    async def store_checkpoint(self, task_id: str, step: int, state: Mapping[str, Any]) -> None:
        """Store a checkpoint from which the next attempt can resume."""
        await self._post_task_call(task_id, "checkpoint", {"step": step, "state": state})

    async def complete_task(self, task_id: str, result: Any) -> None:
        """Complete the task with a result."""
        await self._post_task_call(task_id, "complete", {"result": result})

    async def fail_task(
        self,
        task_id: str,
        kind: str,
        message: str,
        *,
        retryable: bool,
        lease: str | None = None,
        tries: int | None = None,
    ) -> None:
        """Report that the attempt failed."""
        body = {"error": {"type": kind, "message": message[:4000]}, "retryable": retryable}
        await self._post_task_call(task_id, "fail", body, lease, tries=tries)

    async def wait_for_person(self, task_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Release the lease while the task waits for a person's decision or input."""
        return await self._post_task_call(task_id, "wait", body)

    async def release_task(
        self, task_id: str, reason: str, *, lease: str | None = None, tries: int | None = None
    ) -> None:
        """Return the task to its queue without consuming an attempt."""
        await self._post_task_call(task_id, "release", {"reason": reason}, lease, tries=tries)

    async def acknowledge_cancel(self, task_id: str, lease: str) -> None:
        """Acknowledge the cancellation of the task."""
        await self._post_task_call(task_id, "cancelled", {}, lease, tries=5)

    async def call_tool(self, task_id: str, name: str, call_id: str, arguments: Any) -> dict[str, Any]:
        """Call a tool. A repeated call with the same `call_id` does not run the tool again."""
        path = f"tools/{urllib.parse.quote(name, safe='')}"
        body = {"call_id": call_id, "arguments": arguments}
        return await self._post_task_call(task_id, path, body, unless=is_final_response, seconds=TOOL_SECONDS)

    async def get_tool_call(self, task_id: str, call_id: str) -> dict[str, Any]:
        """Return an earlier tool call. If the call is still running, wait up to 50 s for it to end."""
        path = f"/tasks/{task_id}/tools/calls/{urllib.parse.quote(call_id, safe='')}"
        options: dict[str, Any] = {"query": {"wait": OUTCOME_SECONDS}, "seconds": OUTCOME_SECONDS + POLL_SLACK_SECONDS}
        return await call_with_retries(lambda: self.send_request("GET", path, **options), unless=is_final_response)

    async def report_tool_result(self, task_id: str, call_id: str, body: Mapping[str, Any]) -> None:
        """Report the outcome of a tool call that ran on this worker."""
        await self._post_task_call(
            task_id, f"tools/calls/{urllib.parse.quote(call_id, safe='')}/result", body, unless=is_final_response
        )

    async def _post_task_call(
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
        return await call_with_retries(
            lambda: self.send_request("POST", path, body, headers=headers, seconds=seconds), tries=tries, unless=unless
        )


def _trusted_authorities(url: str) -> ssl.SSLContext | bool:
    """Return the certificate authorities to trust: the default ones for `https`, and none for `http`.

    Loading the default certificates takes longer than most requests, and every task process creates a client.
    """
    return urllib.parse.urlsplit(url).scheme != "http" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _is_direct(url: str) -> bool:
    """Return whether requests to the URL are sent without a proxy.

    The client uses a custom transport only for such requests, because a custom transport ignores proxies.
    """
    parts = urllib.parse.urlsplit(url)
    host, proxies = parts.hostname or "", urllib.request.getproxies()
    if host in ("localhost", "::1") or host.startswith("127.") or not {parts.scheme, "all"} & proxies.keys():
        return True
    return bool(urllib.request.proxy_bypass(host))


def _json_object(response: httpx2.Response) -> dict[str, Any] | None:
    """Return the body if it is a JSON object, else None. The API returns only JSON objects."""
    try:
        return msgspec.json.decode(response.content, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None
