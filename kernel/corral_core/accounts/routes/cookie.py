"""The one cookie: it carries a refresh token to `/auth/refresh`, for browsers that should not hold it in a script."""

from __future__ import annotations

from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from corral.config.model import Config
from corral.errors import Forbidden
from corral.http.answers import Request
from corral.http.client_address import LOOPBACK, fold
from corral_core.accounts.service.sessions import Tokens

NAME, PATH = "corral_refresh", "/api/v1/auth"


def cookie_token(request: Request) -> str | None:
    """The refresh token in the request's cookie."""
    try:
        found = SimpleCookie(request.header("cookie") or "").get(NAME)
    except CookieError:
        return None
    return found.value if found is not None and found.value else None


def check_origin(request: Request, config: Config, allowed: Iterable[str]) -> None:
    """A cookie counts only for pages of this host or of a listed origin; else `Forbidden`."""
    origin = request.header("origin") or ""
    own = {f"{scheme}://{request.header('host')}" for scheme in ("http", "https")}
    if origin not in {*own, _origin(config.server.public_url or ""), *allowed} or not origin:
        raise Forbidden("The refresh cookie counts only for this host's own pages; send the token in the body.")


def _origin(url: str) -> str:
    """The origin of a URL as browsers write it."""
    scheme, place = urlsplit(url)[:2]
    return f"{scheme}://{place.lower().removesuffix({'http': ':80', 'https': ':443'}.get(scheme, ''))}"


def cookie_headers(tokens: Tokens, request: Request, config: Config) -> dict[str, str]:
    """Set the cookie for as long as the token is good."""
    return {"Set-Cookie": _cookie(tokens.refresh, tokens.refresh_seconds, request, config)}


def forget_headers(request: Request, config: Config) -> dict[str, str]:
    """Delete the cookie of a client that has it."""
    return {} if cookie_token(request) is None else {"Set-Cookie": _cookie("", 0, request, config)}


def _cookie(value: str, seconds: int, request: Request, config: Config) -> str:
    secure = "" if _is_plain_loopback(request, config) else "; Secure"
    return f"{NAME}={value}; Max-Age={seconds}; Path={PATH}; HttpOnly; SameSite=Strict{secure}"


def _is_plain_loopback(request: Request, config: Config) -> bool:
    """Browsers take a `Secure` cookie over plain http from nobody, not even always from the own machine."""
    if config.server.certfile is not None or (config.server.public_url or "").startswith("https://"):
        return False
    name = urlsplit(f"//{request.header('host') or ''}").hostname or ""
    address = fold(name)
    return name in LOOPBACK or address == "::1" or address.startswith("127.")
