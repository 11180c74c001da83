"""The routes `/health`, `/health/ready` and `/metrics` for load balancers and Prometheus.

They are available at the root of the server, and also under the base path of the API.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
from importlib.metadata import version

import msgspec

from corral.auth.principal import PUBLIC
from corral.errors import Unauthorized, Unavailable
from corral.http.answers import Answer, Request, Text
from corral.http.routes import Routes
from corral.plugin import InstallationConfig
from corral_core.health.service.check_runner import HealthBoard, HealthReport
from corral_core.health.service.readiness import ReadinessChecks, ReadinessProbe
from corral_core.health.service.scrape import MetricsRenderer, to_openmetrics

routes = Routes("", tag="Health")
settings_routes = Routes("/settings", tag="Settings")

SAFE_MODE = {"Corral-Safe-Mode": "1"}
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text"
OPEN_MEDIA_TYPE = f"{OPEN_METRICS}; version=1.0.0; charset=utf-8"


class LivenessView(msgspec.Struct, kw_only=True):
    """The response to a liveness check. Every process returns this response until it shuts down."""

    status: str = "ok"
    service: str = "corral"
    version: str


class ReadinessView(msgspec.Struct, kw_only=True):
    """The readiness of the process. `status` is `ready`, or `not_ready` if a readiness check failed."""

    status: str
    checks: ReadinessChecks


@routes.get("/health", needs=PUBLIC, root=True, exempt_host=True, raises=("shutting_down",))
async def read_health(readiness: ReadinessProbe, installation: InstallationConfig) -> Answer[LivenessView]:
    """Check whether the process is alive. Dependencies are not checked."""
    if not readiness.accepting:
        raise Unavailable("The server is shutting down.", code="shutting_down")
    return Answer(body=LivenessView(version=_corral_version()), headers=SAFE_MODE if installation.safe_mode else {})


@routes.get("/health/ready", needs=PUBLIC, root=True, exempt_host=True, also=(503,))
async def read_readiness(readiness: ReadinessProbe) -> Answer[ReadinessView]:
    """Check whether the process can serve requests. The response status is 503 if a check failed, otherwise 200."""
    checks = await readiness.run_checks()
    ready = all(msgspec.structs.astuple(checks))
    return Answer(
        body=ReadinessView(status="ready" if ready else "not_ready", checks=checks), status=200 if ready else 503
    )


@routes.get("/metrics", needs=PUBLIC, root=True, exempt_host=True, raises=("unauthenticated",))
async def read_metrics(request: Request, installation: InstallationConfig, scrape: MetricsRenderer) -> Text:
    """Read the metrics as Prometheus text, or as OpenMetrics if the `Accept` header requests it.

    If `CORRAL_METRICS_TOKEN` is set, the request must send its value as a bearer token.
    """
    if installation.metrics_token is not None:
        given = (request.header("authorization") or "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, installation.metrics_token.encode()):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Unauthorized(
                "The metrics token is missing or incorrect; send the header Authorization: Bearer <token>.",
                headers=challenge,
            )
    text = await scrape.render_all()
    if OPEN_METRICS in (request.header("accept") or ""):
        # in a thread, because the conversion is slow
        return Text(await asyncio.to_thread(to_openmetrics, text), media_type=OPEN_MEDIA_TYPE)
    return Text(text, media_type=MEDIA_TYPE)


@settings_routes.get("/health", needs="settings.read", remembered=True, no_store=True)
async def read_report(board: HealthBoard) -> HealthReport:
    """Read the state of every dependency, and warnings about the configuration."""
    return await board.full_report()


@functools.cache
def _corral_version() -> str:
    return version("corral")
