"""Maps a request's credential to a principal, and caches the result for one second by default."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from corral.auth.principal import Authenticator, Delegation, Principal, RecheckingAuthenticator
from corral.errors import Malformed, Unauthorized, Unavailable

KEEP_SECONDS = 1.0
REMEMBER_SECONDS = 900.0
CACHE_LIMIT = 10_000
CredentialHeaders = tuple[bytes | None, bytes | None]
"""The `Authorization` and `X-API-Key` headers as received.

The pair is the cache key, so the headers of a request whose principal is cached need not be parsed.
"""
RECHECK_LABEL = "long poll"
"""The label of units of work that re-check the caller of a long-lived request.

Such a unit of work does not count as a new request.
"""
CHALLENGE = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


def read_credential(authorization: str | None, api_key: str | None) -> str | None:
    """Return the credential in the `Authorization` or `X-API-Key` header, or None if neither header is present.

    Raise `Malformed` if both headers are present, and `Unauthorized` if `Authorization` contains no bearer token.
    """
    if authorization is None:
        return api_key
    if api_key is not None:
        raise Malformed("The request has two credentials; send either Authorization or X-API-Key.")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("The Authorization header must have the form Bearer <token>.", headers=CHALLENGE)
    return token.strip()


class Credentials:
    """Authenticates credentials and caches their principals.

    A cached principal expires after one second and is then read from the database again, so a revoked credential stops
    working in every process within that time.
    """

    def __init__(self) -> None:
        self._authenticators: Sequence[Authenticator] = ()
        self._rereading: Sequence[RecheckingAuthenticator] = ()
        self._delegations: dict[str, Delegation] = {}
        self._cache: dict[CredentialHeaders, tuple[Principal, float]] = {}
        self._headers_of_lease: defaultdict[str, set[CredentialHeaders]] = defaultdict(set)

    def set_authenticators(self, authenticators: Sequence[Authenticator]) -> None:
        """Set the authenticators. Their order does not matter, because each accepts a different credential format."""
        self._authenticators = tuple(authenticators)
        self._rereading = tuple(each for each in authenticators if isinstance(each, RecheckingAuthenticator))
        self._delegations = {each.delegation_header: each for each in authenticators if isinstance(each, Delegation)}

    @property
    def delegation_headers(self) -> Iterable[str]:
        """The request headers in which a caller names the principal to act as."""
        return self._delegations.keys()

    def act_as(self, caller: Principal, named: Mapping[str, str]) -> Principal:
        """Return the principal that `caller` acts as. Call this method in a read-only unit of work.

        `named` maps the request's delegation headers to their values. Each value names a principal to act as. Raise a
        `Problem` if the caller may not act as that principal, and `Unavailable` (`plugin_failed`) if the plugin that
        reads the header has failed or is quarantined.
        """
        for header, value in named.items():
            found: Principal | None = self._delegations[header].act_as(caller, value)
            if found is None:  # None: the plugin failed or is quarantined
                raise Unavailable(f"The plugin that reads {header} is not available; try again.", code="plugin_failed")
            caller = found
        return caller

    def cached(self, headers: CredentialHeaders, seconds: float = KEEP_SECONDS) -> Principal | None:
        """Return the principal cached for these credential headers in the last `seconds` seconds, or None."""
        kept = self._cache.get(headers)
        return None if kept is None or time.monotonic() - kept[1] > seconds else kept[0]

    def authenticate(self, credential: str) -> Principal:
        """Authenticate a credential and return its principal. Call this method in a read-only unit of work.

        Raise `Unauthorized` if no authenticator accepts the credential, and `Unavailable` if a plugin that might
        accept it is out of service.
        """
        unsure = False
        for authenticator in self._authenticators:
            recognised: bool | None = authenticator.recognises(credential)  # None: the plugin failed or is quarantined
            if recognised is False:
                continue
            try:
                found: Principal | None = authenticator.authenticate(credential) if recognised else None
            except Unauthorized as problem:
                problem.headers.update(CHALLENGE)
                raise
            if found is not None:
                return found
            unsure = True
        if unsure:
            raise Unavailable("The plugin for this credential type is not available; try again.", code="plugin_failed")
        raise Unauthorized(
            "The credential is not an access token, an API key, a worker token or an agent token.", headers=CHALLENGE
        )

    def reload_principal(self, caller: Principal) -> Principal:
        """Return the current principal of the caller that opened a long-lived connection.

        Call this method in a read-only unit of work.

        Raise `Unauthorized` if the caller lost access, or if no authenticator recognises the caller.
        """
        for authenticator in self._rereading:
            found = authenticator.reread(caller)
            if found is not None:
                return found
        raise Unauthorized("This credential can no longer be checked. Authenticate again.", headers=CHALLENGE)

    def cache(self, headers: CredentialHeaders, principal: Principal) -> None:
        """Cache the principal that these credential headers authenticate. Call this method on the event loop only."""
        if max(len(self._cache), len(self._headers_of_lease)) >= CACHE_LIMIT:
            self._cache.clear()
            self._headers_of_lease.clear()
        self._cache[headers] = (principal, time.monotonic())
        if principal.lease_id is not None:
            self._headers_of_lease[principal.lease_id].add(headers)

    def forget_lease(self, lease_id: str) -> None:
        """Remove from the cache all principals that belong to the lease.

        Leases end very often, so this method looks only at the entries of this lease instead of searching the whole
        cache.
        """
        for headers in self._headers_of_lease.pop(lease_id, ()):
            self._cache.pop(headers, None)

    def forget(self, ends: Callable[[Principal], bool]) -> None:
        """Remove the cached principals for which `ends` returns true, so that they are read from the database again.

        Call this method from `after_commit` when permissions change.
        """
        self._cache = {key: kept for key, kept in self._cache.items() if not ends(kept[0])}
