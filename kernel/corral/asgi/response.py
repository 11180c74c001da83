"""Responses: renders the values that handlers return, and sends them as ASGI messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from corral.asgi.cors import Cors
from corral.asgi.endpoint import Endpoint
from corral.asgi.long_lived_connections import LongLivedConnections
from corral.asgi.request import IncomingRequest
from corral.asgi.streams import send_stream
from corral.errors import Problem
from corral.http.answers import Answer, Encoded, Request, Stream, Text
from corral.http.idempotency import Stored
from corral.schema.shapes import encode

Send = Callable[[Any], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
HSTS = (b"strict-transport-security", b"max-age=31536000")
JSON_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
NO_STORE, PRIVATE = (b"cache-control", b"no-store"), (b"cache-control", b"private, no-cache")
WITH_LOCATION = (201, 202)


class Response:
    """A response: status, headers, and a body as bytes or as a stream of `chunks`.

    `is_whole()` returns whether a stream was sent completely.
    """

    __slots__ = ("body", "chunks", "headers", "is_whole", "media_type", "status")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        media_type: bytes = b"application/json",
        chunks: AsyncIterator[bytes] | None = None,
        is_whole: Callable[[], bool] = lambda: True,
    ) -> None:
        self.status, self.body = status, body
        self.headers: dict[str, str] = dict(headers) if headers else {}
        self.media_type = media_type
        self.chunks = chunks
        self.is_whole = is_whole


def render(value: Any, endpoint: Endpoint, request: IncomingRequest) -> Response:
    """Return the response for a value that a handler returned.

    Shapes are encoded as JSON. A versioned shape gets an `ETag`, or the response is 304 if the client already has this
    version. A created resource gets a `Location`.
    """
    status = endpoint.route.status
    headers: dict[str, str] = {}
    if isinstance(value, Answer):
        status = value.status or status
        headers.update(value.headers)
        value = value.body
    elif isinstance(value, Encoded):
        status = value.status or status
    elif isinstance(value, Text):
        return Response(status, value.body.encode(), value.headers, value.media_type.encode())
    elif isinstance(value, Stream):
        media_type = value.media_type.encode()
        return Response(status, b"", value.headers, media_type, value.chunks, value.is_whole)
    if value is None and status == 204:
        return Response(status, headers=headers)
    if endpoint.versioned:
        tag = headers.setdefault("ETag", f'"{value.version}"')
        if endpoint.is_read and not endpoint.route.live and tag in (request.header("if-none-match") or ""):
            return Response(304, headers=headers)
    if status in WITH_LOCATION and "Location" not in headers:
        identifier = getattr(value, "id", None)
        if identifier is not None:
            headers["Location"] = _location(request.path, identifier)
    return Response(status, value.body if isinstance(value, Encoded) else encode(value), headers)


def _location(path: str, identifier: str) -> str:
    """Return the URL of a created resource: below the request's path, or the part of the path that ends with its id."""
    place = path.lower().find(f"/{identifier}".lower())
    return f"{path.rstrip('/')}/{identifier}" if place < 0 else path[: place + 1] + identifier


def problem_response(problem: Problem, request: Request) -> Response:
    """Return the response that contains the problem document (RFC 9457) of a failure."""
    body = encode(problem.document(request.path, request.request_id))
    return Response(problem.status, body, problem.headers, b"application/problem+json")


def replay(stored: Stored) -> Response:
    """Return the response that is stored under an `Idempotency-Key`. A stream is replayed as one body."""
    headers = {**stored.headers, "Idempotency-Replayed": "true"}
    media_type = headers.pop("Content-Type", "application/json")
    return Response(stored.status, stored.body, headers, media_type.encode())


class ResponseSender:
    """Sends responses as ASGI messages. `hsts` adds the header `Strict-Transport-Security`, for a public https URL."""

    def __init__(self, connections: LongLivedConnections, cors: Cors, *, hsts: bool) -> None:
        self._connections, self._cors = connections, cors
        self._always = (*ALWAYS, HSTS) if hsts else ALWAYS

    def headers(self, response: Response, request: IncomingRequest) -> RawHeaders:
        """Return all headers of a response, including the headers that every response contains."""
        own = response.headers
        headers = [*self._always, (b"x-request-id", request.request_id.encode())]
        if "Cache-Control" not in own:
            no_store = request.endpoint is not None and request.endpoint.route.no_store
            headers.append(NO_STORE if no_store else PRIVATE)
        if response.chunks is None:
            headers.append((b"content-length", b"%d" % len(response.body)))
        if response.body or response.chunks is not None:
            headers.append((b"content-type", response.media_type))
        if "Content-Security-Policy" not in own:
            headers.append(JSON_POLICY)
        if request.quota is not None and "RateLimit-Limit" not in own:
            limit, remaining, reset = request.quota
            headers.append((b"ratelimit-limit", b"%d" % limit))
            headers.append((b"ratelimit-remaining", b"%d" % remaining))
            headers.append((b"ratelimit-reset", b"%d" % reset))
        for name, value in own.items():
            headers.append((name.lower().encode("latin1"), value.encode("latin1")))
        if self._cors.origins:
            headers += self._cors.headers(request, own.get("Allow", ""))
        return headers

    async def send(self, response: Response, request: IncomingRequest, send: Send) -> None:
        """Send a response. A stream is sent until it ends or the client disconnects."""
        start = {"type": "http.response.start", "status": response.status, "headers": self.headers(response, request)}
        await send(start)
        if response.chunks is not None and request.method != "HEAD":
            await send_stream(response.chunks, request, send, self._connections)
            return
        body = b"" if request.method == "HEAD" else response.body
        if request.unread:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await request.discard_body()
            body = b""
        await send({"type": "http.response.body", "body": body, "more_body": False})
