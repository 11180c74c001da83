"""The HTTP routes for circuit breakers."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.http.answers import Answer, IfMatch
from corral.http.page import Page
from corral.http.routes import Routes
from corral_plugins.circuit_breakers.service.administration import BreakerAdministration
from corral_plugins.circuit_breakers.shapes import (
    BreakerConfiguration,
    BreakerDetail,
    BreakerQuery,
    BreakerView,
    ReasonBody,
)

READ, WRITE = "circuit_breakers.read", "circuit_breakers.write"
CHANGES = ("not_found", "precondition_failed")
ACTIONS = (*CHANGES, "quota_exceeded")

routes = Routes("/circuit-breakers", tag="Circuit Breakers")


@routes.get("/", needs=READ)
def list_circuit_breakers(
    query: BreakerQuery, administration: BreakerAdministration, caller: Principal
) -> Page[BreakerView]:
    """List circuit breakers, sorted by name, with their states and counts. The counts are at most a second old."""
    return administration.list_breakers(query, caller)


@routes.post("/", needs=WRITE, status=201, also=(200,), raises=("precondition_failed", "quota_exceeded"))
def configure_circuit_breaker(
    body: BreakerConfiguration, administration: BreakerAdministration, match: IfMatch
) -> Answer[BreakerView]:
    """Create a circuit breaker, or change its configuration. Absent fields keep their values.

    The response has status 201 for a new circuit breaker and 200 for an existing one. For every target that a plugin
    guards, a circuit breaker exists without this request. The configuration applies to all calls from now on.
    `enabled: false` closes the breaker.
    """
    view, is_new = administration.configure(body, match)
    return Answer(body=view, status=201 if is_new else 200)


@routes.get("/{name}", needs=READ, raises=("not_found",), live=True)
def get_circuit_breaker(name: str, administration: BreakerAdministration) -> BreakerDetail:
    """Get a circuit breaker with its last 50 transitions."""
    return administration.get(name)


@routes.delete("/{name}", needs=WRITE, raises=CHANGES)
def delete_circuit_breaker(name: str, administration: BreakerAdministration, match: IfMatch) -> None:
    """Delete a circuit breaker.

    If a plugin still guards calls under its name, a closed breaker with the default configuration takes its place.
    """
    administration.delete(name, match)


@routes.post("/{name}/force-open", needs=WRITE, raises=(*ACTIONS, "invalid_state"))
def force_open_circuit_breaker(
    name: str, body: ReasonBody, administration: BreakerAdministration, match: IfMatch
) -> BreakerView:
    """Open a circuit breaker, and keep it open until an admin closes it.

    At most 1 second later, all processes reject calls.
    """
    return administration.force_open(name, body.reason, match)


@routes.post("/{name}/force-close", needs=WRITE, raises=ACTIONS)
def force_close_circuit_breaker(
    name: str, body: ReasonBody, administration: BreakerAdministration, match: IfMatch
) -> BreakerView:
    """Close a circuit breaker and discard its counts. It opens again if further calls fail."""
    return administration.close(name, "force_close", body.reason, match)


@routes.post("/{name}/reset", needs=WRITE, raises=ACTIONS)
def reset_circuit_breaker(name: str, administration: BreakerAdministration, match: IfMatch) -> BreakerView:
    """Close a circuit breaker and reset its counters to zero. Its configuration is kept."""
    return administration.close(name, "reset", "", match)
