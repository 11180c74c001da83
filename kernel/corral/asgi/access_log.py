"""The access log: a line a request, for those that `http.access_log` asks for. Query strings are never in it."""

from __future__ import annotations

import logging
from typing import Any

from corral.asgi.call import Call
from corral.settings.kernel import ACCESS_LOG
from corral.settings.registry import SettingsRegistry

log = logging.getLogger("corral.access")

FROM_STATUS = {"off": 1000, "errors": 500, "all": 0}


class AccessLog:
    """`least`: answers of this status and above are logged."""

    def __init__(self, settings: SettingsRegistry) -> None:
        self.least = FROM_STATUS["errors"]

        def read() -> None:
            self.least = FROM_STATUS[settings.get(ACCESS_LOG)]

        settings.watch([ACCESS_LOG], read)

    def write(self, call: Call, endpoint: Any, status: int, seconds: float) -> None:
        """One line. `endpoint`: what the table found, or something else when it found nothing."""
        route = endpoint[0].route if isinstance(endpoint, tuple) else None
        log.info(
            "request",
            extra={
                "request_id": call.request_id,
                "method": call.method,
                "route": route.path if route else "unmatched",
                "plugin": route.plugin if route else "",
                "status": status,
                "duration_ms": round(seconds * 1000),
                "client_ip": call.client_ip,
            },
        )
