"""Credentials of every kind: what is no credential here, and what is one that does not suffice."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jwt
import msgspec
from tests.generated import rights
from tests.generated.world import JWT_SECRET, World

from corral.auth.principal import ANY_CALLER, PUBLIC, SIGNED_IN
from corral.http.routes import Route
from corral.ids import new_id
from corral.testing.kit import PASSWORD

OTHER_SECRET = "another-secret-of-more-than-32-bytes-0123456789"
Refusal = tuple[int, str] | None


class Caller(msgspec.Struct, frozen=True):
    """A credential as headers, and how each operation that is not public must refuse it (None: it need not)."""

    name: str
    headers: Mapping[str, str] | Sequence[tuple[str, str]]
    refusal: Callable[[Route], Refusal]
    query: str = ""


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def always(status: int, code: str) -> Callable[[Route], Refusal]:
    return lambda route: (status, code)


UNKNOWN, ENDED = always(401, "unauthenticated"), always(401, "session_revoked")


async def bad(world: World) -> list[Caller]:
    """Whatever is no credential, or is none any more: refused by every operation that is not public."""
    signed_in = await world.again(world.admin)
    found = [
        Caller("none", {}, UNKNOWN),
        Caller("an empty bearer", {"authorization": "Bearer "}, UNKNOWN),
        Caller("the word alone", {"authorization": "Bearer"}, UNKNOWN),
        Caller("another scheme", {"authorization": f"Basic {_base64(PASSWORD.encode())}"}, UNKNOWN),
        Caller(
            "two credentials",
            {**bearer(signed_in["access_token"]), "x-api-key": "crl_x"},
            always(400, "malformed_request"),
        ),
        Caller(
            "one header twice",
            [*bearer("x").items(), *bearer(signed_in["access_token"]).items()],
            always(400, "malformed_request"),
        ),
        Caller("the token in a cookie", {"cookie": f"access_token={signed_in['access_token']}"}, UNKNOWN),
        Caller("the token in the address", {}, UNKNOWN, query=f"?access_token={signed_in['access_token']}"),
        Caller("a refresh token", bearer(signed_in["refresh_token"]), UNKNOWN),
    ]
    ticket = await world.ok(world.client(signed_in["access_token"]), "POST", "/auth/ws-ticket")
    found.append(Caller("a ticket for a socket", bearer(ticket["ticket"]), UNKNOWN))
    garbage = ["x", "\xff\xfe", "a" * 8000, "null", "ey..", "eyJ.e30.", "crl_x", "crw_x", "crg_x", "cra_x", "cra_sx"]
    garbage += ["cra_ax", "crw_" + "A" * 43, "crl_aaaaaaaa_" + "A" * 43 + "000000"]
    found += [Caller(f"garbage: {text[:24]!r}", bearer(text), UNKNOWN) for text in garbage]
    found += [Caller(f"as a key: {text[:24]!r}", {"x-api-key": text}, UNKNOWN) for text in ("x", "crl_x", "")]
    found += [Caller(name, bearer(token), refusal) for name, token, refusal in _forged(signed_in["access_token"])]
    return [*found, *await _ended(world)]


def _forged(token: str) -> Iterator[tuple[str, str, Callable[[Route], Refusal]]]:
    """Tokens like this one, by somebody who has the key and by somebody who has not."""
    header, claims = jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})

    def signed(secret: str = JWT_SECRET, algorithm: str = "HS256", kid: str = header["kid"], **changes: Any) -> str:
        more = {"kid": kid, **changes.pop("headers", {})}
        payload = {name: value for name, value in {**claims, **changes}.items() if value is not None}
        return jwt.encode(payload, secret, algorithm=algorithm, headers=more)

    head, body, signature = token.split(".")
    now = int(time.time())
    assert jwt.decode(signed(), JWT_SECRET, algorithms=["HS256"], audience=claims["aud"]) == claims
    yield "signed with another key", signed(OTHER_SECRET), UNKNOWN
    yield "alg none", _joined({**header, "alg": "none"}, claims, ""), UNKNOWN
    yield "alg None, signed", _joined({**header, "alg": "None"}, claims, signature), UNKNOWN
    yield "another algorithm", signed(algorithm="HS512"), UNKNOWN
    yield "its signature cut", f"{head}.{body}.", UNKNOWN
    yield "its signature changed", f"{head}.{body}.{'B' if signature[0] != 'B' else 'C'}{signature[1:]}", UNKNOWN
    yield "its claims changed", _joined(header, {**claims, "sub": new_id()}, signature), UNKNOWN
    yield "an unknown key id", signed(kid=new_id()), UNKNOWN
    yield "no key id, another key", signed(OTHER_SECRET, kid=""), UNKNOWN
    own = {"kty": "oct", "k": _base64(OTHER_SECRET.encode())}
    yield "its own key in the header", signed(OTHER_SECRET, headers={"jwk": own}), UNKNOWN
    yield "a key by address", signed(OTHER_SECRET, headers={"jku": "http://127.0.0.1:9/keys"}), UNKNOWN
    yield "a critical extension", signed(headers={"crit": ["x"], "x": 1}), UNKNOWN
    yield "a foreign audience", signed(aud="other-api"), UNKNOWN
    yield "several audiences", signed(aud=[claims["aud"], "other-api"]), UNKNOWN
    yield "a foreign issuer", signed(iss=f"corral:{new_id()}"), UNKNOWN
    for kind in ("refresh", "mfa", "Access", ""):
        yield f"typ {kind!r}", signed(typ=kind), UNKNOWN
    for name in ("exp", "nbf", "iat", "sub", "sid", "jti", "typ", "aud", "iss"):
        without: dict[str, Any] = {name: None}
        yield f"without {name}", signed(**without), UNKNOWN
    yield "a number as subject", signed(sub=1), UNKNOWN
    yield "an endless one", signed(exp=1e400), UNKNOWN
    yield "not yet in force", signed(nbf=now + 3600), UNKNOWN
    yield "expired", signed(iat=now - 3600, nbf=now - 3600, exp=now - 60), always(401, "token_expired")
    yield "of another person's session", signed(sub=new_id()), ENDED
    yield "of a session that never was", signed(sid=new_id()), ENDED


async def _ended(world: World) -> list[Caller]:
    """Credentials that were good and whose end was told."""
    found: list[Caller] = []
    leaver = await world.user_like("admin", "leaver@example.org")
    await world.ok(leaver, "POST", "/auth/logout")
    found.append(Caller("a session that was signed out", bearer(leaver.token or ""), ENDED))
    inactive = await world.user_like("admin", "inactive@example.org")
    await world.ok(world.admin, "PATCH", f"/admin/users/{inactive.user['id']}", {"is_active": False})
    found.append(Caller("of a deactivated person", bearer(inactive.token or ""), ENDED))
    worker = await world.machine("gone")
    await world.ok(world.admin, "DELETE", f"/admin/workers/{worker.user['id']}")
    found.append(Caller("of a deleted worker", bearer(worker.token or ""), UNKNOWN))
    key = await world.ok(world.admin, "POST", "/admin/registration-keys", {"name": "gone"})
    await world.ok(world.admin, "DELETE", f"/admin/registration-keys/{key['id']}")
    found.append(Caller("an ended registration key", bearer(key["key"]), UNKNOWN))
    agent = await world.agent(world.owner, "gone")
    token = await world.ok(world.owner, "POST", f"/agents/{agent}/tokens", {"name": "gone", "scopes": ["*"]})
    await world.ok(world.owner, "DELETE", f"/agents/{agent}/tokens/{token['id']}")
    found.append(Caller("an ended agent token", bearer(token["token"]), UNKNOWN))
    claim = await world.lease(world.owner, "completed")
    attempt = world.client(claim["agent_token"])
    await world.ok(attempt, "POST", f"/tasks/{claim['task']['id']}/complete", {"result": {}})
    found.append(Caller("of an attempt that has ended", bearer(claim["agent_token"]), UNKNOWN))
    return [*found, *await _ended_keys(world), await _half_signed_in(world)]


async def _ended_keys(world: World) -> list[Caller]:
    """API keys that were deleted, or whose owner was deactivated."""
    found = []
    for name in ("a deleted key", "a key of a deactivated person"):
        owner = await world.user_like("admin", f"{name.replace(' ', '-')}@example.org")
        made = await world.ok(owner, "POST", "/security/api-keys", {"name": name, "scopes": ["*"]})
        if name == "a deleted key":
            await world.ok(owner, "DELETE", f"/security/api-keys/{made['id']}")
        else:
            await world.ok(world.admin, "PATCH", f"/admin/users/{owner.user['id']}", {"is_active": False})
        found += [
            Caller(name, bearer(made["key"]), UNKNOWN),
            Caller(f"{name}, bare", {"x-api-key": made["key"]}, UNKNOWN),
        ]
    return found


async def _half_signed_in(world: World) -> Caller:
    """Who has given the password of an account with a second factor, and no code yet."""
    person = await world.user_like("admin", "careful@example.org")
    seed = (await world.ok(person, "POST", "/auth/mfa/setup", {"password": PASSWORD}))["secret"]
    await world.ok(person, "POST", "/auth/mfa/verify", {"code": _code(seed)})
    return Caller("a token for the second factor", bearer((await world.again(person))["mfa_token"]), UNKNOWN)


def _code(seed: str) -> str:
    """The code of this moment (RFC 6238)."""
    key = base64.b32decode(seed + "=" * (-len(seed) % 8))
    mac = hmac.digest(key, int(time.time() // 30).to_bytes(8, "big"), "sha1")
    at = mac[-1] & 15
    return f"{(int.from_bytes(mac[at : at + 4], 'big') & 0x7FFFFFFF) % 10**6:06}"


async def insufficient(world: World) -> list[Caller]:
    """Good credentials, each with what it may not do."""
    plain = world.client((await world.again(world.admin))["access_token"])
    people = (("admin", plain), ("member", world.owner), ("viewer", world.viewer), ("auditor", world.auditor))
    found = [Caller(role, bearer(person.token or ""), _person(role)) for role, person in people]
    limited = await world.user_like("admin", "limited@example.org")
    await world.ok(world.admin, "PATCH", f"/admin/users/{limited.user['id']}", {"must_change_password": True})
    again = await world.again(limited)
    found.append(Caller("an admin who must change the password", bearer(again["access_token"]), _limited))
    found.append(Caller("worker", bearer(world.worker.token or ""), _machine("worker")))
    waiting = await world.ok(world.admin, "POST", "/workers/register", {"name": "waiting"})
    if not waiting["is_approved"]:
        found.append(Caller("a worker without approval", bearer(waiting["token"]), _waiting))
    found.append(Caller("registration key", bearer(world.registration_key.token or ""), _registration))
    agent = await world.agent(world.admin, "standing")
    token = await world.ok(world.admin, "POST", f"/agents/{agent}/tokens", {"name": "all", "scopes": ["*"]})
    found.append(Caller("an admin's agent", bearer(token["token"]), _machine("agent")))
    claim = await world.lease(world.admin, "attempt")
    found.append(Caller("an attempt for an admin", bearer(claim["agent_token"]), _machine("agent")))
    return [*found, *await _keys(world)]


async def _keys(world: World) -> list[Caller]:
    """API keys of an admin: one that reads, one that may do everything a key may."""
    found: list[Caller] = []
    for name, scopes in (("a key that reads", ["*.read"]), ("a key with every scope", ["*"])):
        made = await world.ok(world.admin, "POST", "/security/api-keys", {"name": name, "scopes": scopes})
        refusal = _reading_key if scopes == ["*.read"] else _full_key
        found.append(Caller(name, bearer(made["key"]), refusal))
        found.append(Caller(f"{name}, as X-API-Key", {"x-api-key": made["key"]}, refusal))
    return found


def _person(role: str) -> Callable[[Route], Refusal]:
    def refusal(route: Route) -> Refusal:
        if not rights.suffices(role, route.needs):
            return 403, "forbidden"
        return (403, "reauth_required") if route.step_up else None

    return refusal


def _limited(route: Route) -> Refusal:
    return None if rights.is_for_limited(route) else (403, "password_change_required")


def _machine(kind: str) -> Callable[[Route], Refusal]:
    """What only people may do: their own account, and whatever no permission of this kind of machine opens."""

    def refusal(route: Route) -> Refusal:
        if ANY_CALLER in route.needs and not route.own_session:
            return None
        people = any(need == SIGNED_IN or _is_admins(need) for need in route.needs)
        others = [need for need in route.needs if need != SIGNED_IN and not _is_admins(need)]
        return (403, "forbidden") if (people and not others) or route.own_session or route.step_up else None

    return refusal


def _is_admins(need: str) -> bool:
    if need in (PUBLIC, ANY_CALLER, SIGNED_IN) or rights.is_machines(need):
        return False
    return not rights.holds("member", need)


def _waiting(route: Route) -> Refusal:
    return None if route.label == "POST /workers/{id}/heartbeat" else (403, "worker_not_approved")


def _registration(route: Route) -> Refusal:
    """It registers; of what a registrant may do for a worker that exists, it sees none."""
    if route.label in rights.REGISTRATION:
        return None
    return (404, "not_found") if "workers.register" in route.needs else (403, "forbidden")


def _reading_key(route: Route) -> Refusal:
    """Reads what its owner reads; never what takes an own session or a scope named in full."""
    if ANY_CALLER in route.needs or SIGNED_IN in route.needs:
        return (403, "insufficient_scope") if route.own_session or route.step_up else None
    if all(rights.is_machines(need) for need in route.needs):
        return 403, "forbidden"
    reads = any(need.endswith(".read") for need in route.needs)
    return None if reads and not (route.own_session or route.step_up) else (403, "insufficient_scope")


def _full_key(route: Route) -> Refusal:
    if all(rights.is_machines(need) for need in route.needs):
        return 403, "forbidden"
    return (403, "insufficient_scope") if route.own_session or route.step_up else None


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _joined(header: Any, claims: Any, signature: str) -> str:
    return ".".join([*(_base64(json.dumps(part).encode()) for part in (header, claims)), signature])
