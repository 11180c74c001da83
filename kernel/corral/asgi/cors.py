"""Cross-origin requests (CORS).

Web pages of the origins in `http.cors_origins` may call the API; by default, the list is empty.
"""

from __future__ import annotations

from collections.abc import Iterable

from corral.asgi.request import IncomingRequest
from corral.settings.kernel import CORS_ORIGINS
from corral.settings.registry import SettingsRegistry

Headers = list[tuple[bytes, bytes]]

PREFLIGHT_SECONDS = 600
REQUEST_HEADERS = (
    "Authorization, Content-Type, X-API-Key, X-Request-ID, Idempotency-Key, If-Match, If-None-Match,"
    " Last-Event-ID, Range"
)
RESPONSE_HEADERS = (
    "ETag, Location, X-Request-ID, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset,"
    " Idempotency-Replayed, Corral-Affected, Content-Disposition, Content-Range"
)
VARY = (b"vary", b"Origin")


class Cors:
    """Creates the CORS headers of responses. The allowed origin is never `*`: only a listed origin is echoed."""

    def __init__(self, settings: SettingsRegistry, delegation_headers: Iterable[str]) -> None:
        self._settings = settings
        self._request_headers = ", ".join([REQUEST_HEADERS, *delegation_headers]).encode()
        self.origins: frozenset[bytes] = frozenset()
        settings.watch([CORS_ORIGINS], self._read)

    def _read(self) -> None:
        self.origins = frozenset(origin.encode() for origin in self._settings.get(CORS_ORIGINS))

    def headers(self, request: IncomingRequest, allow: str) -> Headers:
        """Return the CORS headers for the response to this request.

        `allow` lists the methods that the response to a preflight request names.
        """
        origin = request.headers.get(b"origin")
        if origin not in self.origins or origin is None:
            return [VARY]
        found = [VARY, (b"access-control-allow-origin", origin), (b"access-control-allow-credentials", b"true")]
        if request.method == "OPTIONS" and b"access-control-request-method" in request.headers:
            found.append((b"access-control-allow-methods", allow.encode()))
            found.append((b"access-control-allow-headers", self._request_headers))
            found.append((b"access-control-max-age", b"%d" % PREFLIGHT_SECONDS))
        else:
            found.append((b"access-control-expose-headers", RESPONSE_HEADERS.encode()))
        return found
