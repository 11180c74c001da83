"""The refresh cookie, which contains the refresh token for `/auth/refresh`. Browser scripts cannot read it."""

from __future__ import annotations

from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from corral.errors import Forbidden
from corral.http.answers import Request
from corral.http.client_address import LOOPBACK, canonical_ip
from corral.plugin import InstallationConfig

NAME, PATH = "corral_refresh", "/api/v1/auth"


def cookie_token(request: Request) -> str | None:
    """Return the refresh token from the request's refresh cookie, or None if the request has no such cookie."""
    try:
        found = SimpleCookie(request.header("cookie") or "").get(NAME)
    except CookieError:
        return None
    return found.value if found is not None and found.value else None


def check_origin(request: Request, installation: InstallationConfig, allowed: Iterable[str]) -> None:
    """Raise `Forbidden` unless `Origin` names the host in the `Host` header, the public URL or an allowed origin."""
    origin = request.header("origin") or ""
    own = {f"{scheme}://{request.header('host')}" for scheme in ("http", "https")}
    if origin not in {*own, _origin_of_url(installation.public_url or ""), *allowed} or not origin:
        raise Forbidden(
            "The refresh cookie is accepted only from pages on this host; send the refresh token in the body instead."
        )


def _origin_of_url(url: str) -> str:
    """Return the origin of a URL in the form that browsers send: lower-case and without a default port."""
    scheme, place = urlsplit(url)[:2]
    return f"{scheme}://{place.lower().removesuffix({'http': ':80', 'https': ':443'}.get(scheme, ''))}"


def cookie_headers(refresh: str, seconds: int, request: Request, installation: InstallationConfig) -> dict[str, str]:
    """Return the response headers that set the refresh cookie for the lifetime of the refresh token."""
    return {"Set-Cookie": _set_cookie_header(refresh, seconds, request, installation)}


def cookie_deletion_headers(request: Request, installation: InstallationConfig) -> dict[str, str]:
    """Return the response headers that delete the refresh cookie, if the client sent one."""
    return {} if cookie_token(request) is None else {"Set-Cookie": _set_cookie_header("", 0, request, installation)}


def _set_cookie_header(value: str, seconds: int, request: Request, installation: InstallationConfig) -> str:
    secure = "" if _is_plain_loopback(request, installation) else "; Secure"
    return f"{NAME}={value}; Max-Age={seconds}; Path={PATH}; HttpOnly; SameSite=Strict{secure}"


def _is_plain_loopback(request: Request, installation: InstallationConfig) -> bool:
    """Return whether the request uses plain HTTP on the loopback interface.

    Browsers may reject `Secure` cookies there.
    """
    if installation.has_tls or (installation.public_url or "").startswith("https://"):
        return False
    name = urlsplit(f"//{request.header('host') or ''}").hostname or ""
    address = canonical_ip(name)
    return name in LOOPBACK or address == "::1" or address.startswith("127.")
