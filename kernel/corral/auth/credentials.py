"""From a request's credential to its principal, with a cache of at most one second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from corral.auth.principal import Authenticator, Delegation, Principal, Rereading
from corral.errors import Malformed, Unauthorized, Unavailable

KEEP_SECONDS = 1.0
REMEMBER_SECONDS = 900.0
CACHE_LIMIT = 10_000
Given = tuple[bytes | None, bytes | None]
"""`Authorization` and `X-API-Key` as they came: one look-up tells whose they are, without reading them again."""
STILL_THERE = "long poll"
"""The label of units that look again at the caller of a call under way, which is no new call of theirs."""
CHALLENGE = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


def read_credential(authorization: str | None, api_key: str | None) -> str | None:
    """The credential of a request's headers. Two of them are `malformed_request`."""
    if authorization is None:
        return api_key
    if api_key is not None:
        raise Malformed("Two credentials in one request: send Authorization or X-API-Key.")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("Use Authorization: Bearer <token>.", headers=CHALLENGE)
    return token.strip()


class Credentials:
    """Principals by credential.

    Rows are asked again after a second, so whatever ends a credential ends it everywhere.
    """

    def __init__(self) -> None:
        self._authenticators: Sequence[Authenticator] = ()
        self._rereading: Sequence[Rereading] = ()
        self._delegations: dict[str, Delegation] = {}
        self._cache: dict[Given, tuple[Principal, float]] = {}

    def use(self, authenticators: Sequence[Authenticator]) -> None:
        """Ask these, in any order: their forms do not overlap."""
        self._authenticators = tuple(authenticators)
        self._rereading = tuple(each for each in authenticators if isinstance(each, Rereading))
        self._delegations = {each.delegation_header: each for each in authenticators if isinstance(each, Delegation)}

    @property
    def delegation_headers(self) -> Iterable[str]:
        """The headers in which callers name the principal that they act as."""
        return self._delegations.keys()

    def act_as(self, caller: Principal, named: Mapping[str, str]) -> Principal:
        """The principal that the values of delegation headers name; joins a read unit."""
        for header, value in named.items():
            found: Principal | None = self._delegations[header].act_as(caller, value)
            if found is None:  # its plugin failed or is held
                raise Unavailable(f"The plugin that reads the header {header} is out of service.", code="plugin_failed")
            caller = found
        return caller

    def known(self, given: Given, seconds: float = KEEP_SECONDS) -> Principal | None:
        """The principal of these headers, if it was read within the last second, or within so many."""
        kept = self._cache.get(given)
        return None if kept is None or time.monotonic() - kept[1] > seconds else kept[0]

    def authenticate(self, credential: str) -> Principal:
        """Read the principal; joins a read unit. Raises `Unauthorized`: nobody knows it, and nobody else might."""
        unsure = False
        for authenticator in self._authenticators:
            recognised: bool | None = authenticator.recognises(credential)  # None: its plugin failed or is held
            found: Principal | None = None
            if recognised:
                try:
                    found = authenticator.authenticate(credential)
                except Unauthorized as problem:
                    problem.headers.update(CHALLENGE)
                    raise
            if found is not None:
                return found
            unsure = unsure or recognised is not False
        if unsure:
            raise Unavailable("A plugin that may know this credential is out of service.", code="plugin_failed")
        raise Unauthorized("This is neither an access token, nor an API key, nor a worker's token.", headers=CHALLENGE)

    def reread(self, caller: Principal) -> Principal:
        """The caller of a long connection as it is now; joins a read unit. `Unauthorized`, also if nobody can tell."""
        for authenticator in self._rereading:
            found = authenticator.reread(caller)
            if found is not None:
                return found
        raise Unauthorized("Nobody can tell what has become of this credential.", headers=CHALLENGE)

    def keep(self, given: Given, principal: Principal) -> None:
        """Use this principal for the next second; on the loop only."""
        if len(self._cache) >= CACHE_LIMIT:
            self._cache.clear()
        self._cache[given] = (principal, time.monotonic())

    def forget(self, ends: Callable[[Principal], bool]) -> None:
        """Read those principals anew at their next request; call it by `after_commit` when rights change."""
        self._cache = {key: kept for key, kept in self._cache.items() if not ends(kept[0])}
