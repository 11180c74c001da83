"""The access log: one line per request. The setting `http.access_log` selects which requests are logged.

Query strings are never logged.
"""

from __future__ import annotations

import logging

from corral.asgi.request import IncomingRequest
from corral.settings.kernel import ACCESS_LOG
from corral.settings.registry import SettingsRegistry

log = logging.getLogger("corral.access")

MIN_STATUS = {"off": 1000, "errors": 500, "all": 0}


class AccessLog:
    """Writes the access log. Only responses with a status of at least `min_status` are logged."""

    def __init__(self, settings: SettingsRegistry) -> None:
        self.min_status = MIN_STATUS["errors"]

        def read() -> None:
            self.min_status = MIN_STATUS[settings.get(ACCESS_LOG)]

        settings.watch([ACCESS_LOG], read)

    def write(self, request: IncomingRequest, status: int, seconds: float) -> None:
        """Log one request, which took `seconds`. The caller has already compared the status with `min_status`."""
        route = request.endpoint.route if request.endpoint is not None else None
        log.info(
            "request",
            extra={
                "request_id": request.request_id,
                "method": request.method,
                "route": route.path if route else "unmatched",
                "plugin": route.plugin if route else "",
                "status": status,
                "duration_ms": round(seconds * 1000),
                "client_ip": request.client_ip,
            },
        )
