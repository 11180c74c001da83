"""Counters of requests, plugin errors and events. The `health` plugin reports them as metrics of the process.

All labels have a bounded set of values.
"""

from __future__ import annotations

from collections import Counter

from corral.metrics.histogram import OTHER, Histogram

BUCKETS = (0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
# The first routes to be observed get their own time series. The others share one.
MAX_COUNTED, MAX_TIMED = 700, 80
# Codes of bodies that were rejected before their fields were validated.
BODY_CODES = ("payload_too_large", "request_timeout", "unsupported_media_type", "malformed_json", "malformed_multipart")


class RequestMetrics:
    """The counters of requests, plugin errors and events in one process. Only the event loop changes them."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()  # method, route template, status class
        self.seconds = Histogram(BUCKETS, MAX_TIMED)  # by route template
        self.in_flight = 0
        self.body_rejected: Counter[str] = Counter()
        self.plugin_errors: Counter[str] = Counter()
        self.events: Counter[str] = Counter()

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. `route` is the route template or `unmatched`."""
        counted = (method, route, status // 100)
        if counted not in self.requests and len(self.requests) >= MAX_COUNTED:
            counted = (method, OTHER, status // 100)
        self.requests[counted] += 1
        self.seconds.observe(seconds, (route,))
