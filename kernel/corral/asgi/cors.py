"""Pages of other origins may call if `http.cors_origins` lists them, exactly; by default none does."""

from __future__ import annotations

from corral.asgi.call import Call, Reply
from corral.settings.kernel import CORS_ORIGINS
from corral.settings.registry import SettingsRegistry

Headers = list[tuple[bytes, bytes]]

KEEP_SECONDS = 600
SENT = (
    "Authorization, Content-Type, X-API-Key, X-Request-ID, Idempotency-Key, If-Match, If-None-Match, Corral-Lease,"
    " Last-Event-ID, Range"
)
READ = (
    "ETag, Location, X-Request-ID, Retry-After, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset,"
    " Idempotency-Replayed, Corral-Affected, Content-Disposition, Content-Range"
)
VARY = (b"vary", b"Origin")


class Cors:
    """What answers tell browsers. Never `*`: an origin is named back only if it is listed."""

    def __init__(self, settings: SettingsRegistry) -> None:
        self._settings = settings
        self._listed: frozenset[bytes] = frozenset()
        settings.watch([CORS_ORIGINS], self._read)

    def _read(self) -> None:
        self._listed = frozenset(origin.encode() for origin in self._settings.get(CORS_ORIGINS))

    def headers(self, call: Call, reply: Reply) -> Headers:
        """The headers to add; a preflight (`OPTIONS` that asks for a method) learns what it may send."""
        if not self._listed:
            return []
        origin = call.headers.get(b"origin")
        if origin not in self._listed or origin is None:
            return [VARY]
        found = [VARY, (b"access-control-allow-origin", origin), (b"access-control-allow-credentials", b"true")]
        if call.method == "OPTIONS" and b"access-control-request-method" in call.headers:
            found.append((b"access-control-allow-methods", reply.headers.get("Allow", "").encode()))
            found.append((b"access-control-allow-headers", SENT.encode()))
            found.append((b"access-control-max-age", b"%d" % KEEP_SECONDS))
        else:
            found.append((b"access-control-expose-headers", READ.encode()))
        return found
