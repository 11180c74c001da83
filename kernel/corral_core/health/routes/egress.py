"""Routes under `/egress`: read the rules for outgoing connections, and check an address against them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.egress.client import Egress
from corral.egress.guard import DENIED, METADATA, PORTS, PRIVATE
from corral.errors import Invalid
from corral.http.routes import Routes
from corral_core.health.service.egress_check import judge

routes = Routes("/egress", tag="Egress")

READ = "settings.read"
Text = Annotated[str, Meta(min_length=1, max_length=8192)]


class EgressProfileView(msgspec.Struct, kw_only=True):
    """An egress profile, which determines the networks to which Corral may open a connection.

    `opens` lists networks that are denied by default but allowed by this profile. `refuses` lists networks that this
    profile denies even if they are part of a network in `opens`.
    """

    opens: list[str]
    refuses: list[str]


class EgressPolicyView(msgspec.Struct, kw_only=True):
    """The rules of the egress guard. `allowed` and `proxy` can be set only in the environment or in corral.toml."""

    profiles: dict[str, EgressProfileView]
    denied_networks: list[str]
    allowed: list[str]
    ports: str
    own_listeners: list[str]
    proxy: str | None


class AddressCheck(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The address to check: either a `url`, or a `host` and a `port`."""

    url: Text | UnsetType = UNSET
    host: Text | UnsetType = UNSET
    port: Annotated[int, Meta(ge=1, le=65535)] | UnsetType = UNSET
    profile: Literal["public", "internal"] = "public"


class EgressVerdictView(msgspec.Struct, kw_only=True):
    """The result of an address check.

    `reason` is null if the address is allowed. Otherwise, it is `unresolved_host`, `egress.scheme`, `egress.userinfo`,
    `egress.port`, `egress.address` or `egress.own_listener`.
    """

    allowed: bool
    reason: str | None
    addresses: list[str]


@routes.get("/policy", needs=READ)
async def read_policy(egress: Egress) -> EgressPolicyView:
    """Read the rules for outgoing connections."""
    internal = EgressProfileView(opens=[str(each) for each in PRIVATE], refuses=[str(each) for each in METADATA])
    return EgressPolicyView(
        profiles={"public": EgressProfileView(opens=[], refuses=[]), "internal": internal},
        denied_networks=[str(network) for network in DENIED],
        allowed=list(egress.guard.allowed),
        ports=PORTS,
        own_listeners=sorted(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in egress.guard.listeners
        ),
        proxy=egress.proxy_address,
    )


@routes.post("/check", needs=READ)
async def check_address(body: AddressCheck, egress: Egress) -> EgressVerdictView:
    """Check whether Corral may connect to an address. The address is resolved and checked, but never contacted."""
    if isinstance(body.url, str):
        if body.host is not UNSET or body.port is not UNSET:
            raise Invalid.at("/url", "not_allowed", "Give a url, or a host and a port.")
        verdict = await judge(egress, body.url, profile=body.profile)
    elif isinstance(body.host, str) and isinstance(body.port, int):
        verdict = await judge(egress, host=body.host, port=body.port, profile=body.profile)
    else:
        raise Invalid.at("/url", "required", "Give a url, or a host and a port.")
    return EgressVerdictView(allowed=verdict.allowed, reason=verdict.reason, addresses=list(verdict.addresses))
