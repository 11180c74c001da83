"""Metrics of HTTP requests, stored as plain numbers and rendered as Prometheus text.

All labels have a bounded set of values.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

BUCKETS = (0.0025, 0.005, 0.01, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
# The first routes to be observed get their own time series. The others share one.
MAX_COUNTED, MAX_TIMED, OTHER = 700, 80, "other"
# Codes of bodies that were rejected before their fields were validated.
BODY_CODES = ("payload_too_large", "request_timeout", "unsupported_media_type", "malformed_json", "malformed_multipart")


class RequestMetrics:
    """The metrics of HTTP requests. Only the event loop changes them."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()  # method, route template, status class
        self.seconds: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS) + 1))
        self.seconds_sum: Counter[str] = Counter()
        self.in_flight = 0
        self.body_rejected: Counter[str] = Counter()
        self.plugin_errors: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.plugins: Callable[[], Iterable[str]] = tuple  # returns the rendered lines of the plugin metrics

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. `route` is the route template or `unmatched`."""
        counted = (method, route, status // 100)
        if counted not in self.requests and len(self.requests) >= MAX_COUNTED:
            counted = (method, OTHER, status // 100)
        self.requests[counted] += 1
        if route not in self.seconds and len(self.seconds) >= MAX_TIMED:
            route = OTHER
        self.seconds[route][bisect.bisect_left(BUCKETS, seconds)] += 1
        self.seconds_sum[route] += seconds  # type: ignore[assignment]  # a Counter of floats

    def render(self) -> str:
        """Return the metrics as Prometheus text."""
        lines = ["# HELP corral_http_requests_total Answered requests.", "# TYPE corral_http_requests_total counter"]
        for (method, route, status), count in sorted(self.requests.items()):
            lines.append(f'corral_http_requests_total{{method="{method}",route="{route}",status="{status}xx"}} {count}')
        lines += ["# HELP corral_http_request_seconds Time to answer.", "# TYPE corral_http_request_seconds histogram"]
        for route, buckets in sorted(self.seconds.items()):
            total = 0
            for bound, count in zip((*BUCKETS, "+Inf"), buckets, strict=True):
                total += count
                lines.append(f'corral_http_request_seconds_bucket{{route="{route}",le="{bound}"}} {total}')
            lines.append(f'corral_http_request_seconds_sum{{route="{route}"}} {self.seconds_sum[route]:.6f}')
            lines.append(f'corral_http_request_seconds_count{{route="{route}"}} {total}')
        lines += ["# HELP corral_http_in_flight Requests being served.", "# TYPE corral_http_in_flight gauge"]
        lines.append(f"corral_http_in_flight {self.in_flight}")
        for name, label, counter in (
            ("corral_http_body_rejected_total", "reason", self.body_rejected),
            ("corral_plugin_errors_total", "plugin", self.plugin_errors),
            ("corral_events_total", "type", self.events),
        ):
            lines += [f"# HELP {name} Since the start.", f"# TYPE {name} counter"]
            lines += [f'{name}{{{label}="{value}"}} {count}' for value, count in sorted(counter.items())]
        return "\n".join([*lines, *self.plugins()]) + "\n"
