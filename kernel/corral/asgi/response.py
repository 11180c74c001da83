"""Renders the values that handlers return as responses, and sends responses as ASGI messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from corral.asgi.endpoint import Endpoint
from corral.asgi.request import WHOLE_RESPONSE, IncomingRequest
from corral.asgi.streams import LongLivedConnections, send_stream
from corral.errors import Problem
from corral.http.answers import Answer, Encoded, Response, Stream, Text
from corral.kernel import Kernel
from corral.schema.conversion import encode
from corral.settings.kernel import CORS_ORIGINS

Send = Callable[[Any], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

DEFAULTS = {  # headers of every response that does not set them itself
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"private, no-cache",
}
HSTS = {b"strict-transport-security": b"max-age=31536000"}
CROSS_ORIGIN_REQUEST_HEADERS = (
    "Authorization, Content-Type, X-API-Key, X-Request-ID, Idempotency-Key, If-Match, If-None-Match,"
    " Last-Event-ID, Range"
)
CROSS_ORIGIN_RESPONSE_HEADERS = (
    b"ETag, Location, X-Request-ID, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset,"
    b" Idempotency-Replayed, Corral-Affected, Content-Disposition, Content-Range"
)


def render(value: Any, endpoint: Endpoint, request: IncomingRequest) -> Response:
    """Return the response for a value that a handler returned.

    Response bodies are encoded as JSON. If the body has a `version` field, the response gets an `ETag` header; if the
    client already has this version, the status is 304. The response to a request that created a resource gets a
    `Location` header.
    """
    status = endpoint.route.status
    headers: dict[str, str] = {}
    if isinstance(value, Answer | Encoded | Stream):
        status = value.status or status
    if isinstance(value, Answer):
        headers.update(value.headers)
        value = value.body
    elif isinstance(value, Text):
        return Response(status, value.body.encode(), dict(value.headers), value.media_type)
    elif isinstance(value, Stream):
        return Response(status, b"", dict(value.headers), value.media_type, value.chunks, value.is_whole)
    if value is None and status == 204:
        return Response(status, headers=headers)
    if endpoint.returns_version:
        tag = headers.setdefault("ETag", f'"{value.version}"')
        known = request.headers.get(b"if-none-match")
        if known is not None and endpoint.is_read and not endpoint.route.live and tag.encode() in known:
            return Response(304, headers=headers)
    if status in (201, 202) and "Location" not in headers:
        identifier = getattr(value, "id", None)
        if identifier is not None:
            headers["Location"] = _location(request.path, identifier)
    return Response(status, value.body if isinstance(value, Encoded) else encode(value), headers)


def _location(path: str, identifier: str) -> str:
    """Return the URL of a created resource.

    If the path of the request contains the id, the URL is the path up to and including the id. Otherwise, the id is
    appended to the path.
    """
    place = path.lower().find(f"/{identifier}".lower())
    return f"{path.rstrip('/')}/{identifier}" if place < 0 else path[: place + 1] + identifier


def problem_response(problem: Problem, request: IncomingRequest) -> Response:
    """Return a response that contains the problem document (RFC 9457) for a failure."""
    body = encode(problem.document(request.path, request.request_id))
    return Response(problem.status, body, problem.headers, "application/problem+json")


class ResponseSender:
    """Sends responses as ASGI messages, with the headers that every response contains.

    `Strict-Transport-Security` is sent if the public URL is an https URL. Web pages from the origins in
    `http.cors_origins` may call the API. The CORS headers name the origin of the page, never `*`.
    """

    def __init__(self, kernel: Kernel, connections: LongLivedConnections) -> None:
        self._connections, self._settings = connections, kernel.settings
        self._defaults = DEFAULTS | HSTS if (kernel.config.server.public_url or "").startswith("https://") else DEFAULTS
        cross_origin_headers = [CROSS_ORIGIN_REQUEST_HEADERS, *kernel.credentials.delegation_headers]
        self._cross_origin_request_headers = ", ".join(cross_origin_headers).encode()

    def headers(self, response: Response, request: IncomingRequest) -> RawHeaders:
        """Return all headers of a response, including the headers that every response contains."""
        headers = {**self._defaults, b"x-request-id": request.request_id.encode()}
        if request.endpoint is not None and request.endpoint.route.no_store:
            headers[b"cache-control"] = b"no-store"
        if response.body or response.chunks is not None:
            headers[b"content-type"] = response.media_type.encode()
        if request.quota is not None:
            limit, remaining, reset = request.quota
            headers[b"ratelimit-limit"] = b"%d" % limit
            headers[b"ratelimit-remaining"] = b"%d" % remaining
            headers[b"ratelimit-reset"] = b"%d" % reset
        for name, value in response.headers.items():
            headers[name.lower().encode("latin1")] = value.encode("latin1")
        if response.chunks is None:  # last, because a wrong length would mix up the responses of a connection
            headers[b"content-length"] = b"%d" % len(response.body)
        if origins := self._settings.get(CORS_ORIGINS):
            self._add_cross_origin(headers, request, origins)
        return list(headers.items())

    def _add_cross_origin(self, headers: dict[bytes, bytes], request: IncomingRequest, origins: list[str]) -> None:
        """Add the CORS headers. A preflight response allows the methods that its `Allow` header lists."""
        origin = request.headers.get(b"origin", b"")
        headers[b"vary"] = b"Origin"
        if origin.decode("latin1") not in origins:
            return
        headers |= {b"access-control-allow-origin": origin, b"access-control-allow-credentials": b"true"}
        if request.method == "OPTIONS" and b"access-control-request-method" in request.headers:
            headers[b"access-control-allow-methods"] = headers.get(b"allow", b"")
            headers[b"access-control-allow-headers"] = self._cross_origin_request_headers
            headers[b"access-control-max-age"] = b"600"
        else:
            headers[b"access-control-expose-headers"] = CROSS_ORIGIN_RESPONSE_HEADERS

    async def send(self, response: Response, request: IncomingRequest, send: Send) -> None:
        """Send a response. A stream is sent until it ends or the client disconnects."""
        message = {"type": WHOLE_RESPONSE, "status": response.status, "headers": self.headers(response, request)}
        if WHOLE_RESPONSE in (request.scope.get("extensions") or ()) and response.chunks is None and not request.unread:
            await send({**message, "body": response.body})
            return
        await send({**message, "type": "http.response.start"})
        if response.chunks is not None and request.method != "HEAD":
            await send_stream(response.chunks, request, send, self._connections)
            return
        body = b"" if request.method == "HEAD" else response.body
        if request.unread:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await request.discard_body()
            body = b""
        await send({"type": "http.response.body", "body": body, "more_body": False})
