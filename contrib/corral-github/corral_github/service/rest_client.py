"""A client for the REST API of GitHub or a compatible code host. Requests pass through the egress guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from corral import clock
from corral.database.engine import Work
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.egress.resolver import Unresolved
from corral.egress.transport import is_truncated
from corral.errors import ExpectedFailure, Problem
from corral.redact.redactor import Redactor
from corral.schema.strict_json import parse_json
from corral_github.models import Repository
from corral_github.service.secrets import RepositorySecrets

if TYPE_CHECKING:
    import httpx2

Json = dict[str, Any]
MIB = 1024 * 1024
DIFF_BYTES = 2 * MIB
PAGE_SIZE, MAX_PAGES = 100, 30
CALL_SECONDS = 20.0
MAX_PAUSE_SECONDS = 6 * 3600.0
API_VERSION = "2022-11-28"
LATER = frozenset({301, 302, 307, 308, 401, 403, 404, 408, 423, 425, 429})
"""HTTP status codes of failures that may be temporary, or that an admin can resolve, for example with a new token.

Requests that fail with one of these codes, or with a code of 500 or above, are retried.
"""


class HostFailure(ExpectedFailure):
    """Raised if a request to the code host failed, but may succeed later.

    `pause_seconds` is the number of seconds for which the code host asks clients to send no requests.
    """

    def __init__(self, detail: str, pause_seconds: float | None = None) -> None:
        self.detail, self.pause_seconds = detail, pause_seconds
        super().__init__(detail)


class HostRefusal(ExpectedFailure):
    """Raised if the code host permanently refused a request."""

    def __init__(self, status: int, detail: str) -> None:
        self.status, self.detail = status, detail
        super().__init__(detail)


class DiffTooLarge(ExpectedFailure):
    """Raised if a diff is too large for a code review, or too large for the code host to send."""


class RepositoryClients:
    """Opens API clients for repositories."""

    def __init__(self, egress: Egress, work: Work, secrets: RepositorySecrets, redactor: Redactor) -> None:
        self._egress, self._work, self._secrets, self._redactor = egress, work, secrets, redactor

    async def open(self, repository: Repository) -> RepositoryClient:
        """Return a client for a repository.

        The caller must close it. Raise `HostFailure` if the repository has no usable token.
        """
        try:
            token = await self._work(lambda: self._secrets.token(repository), read=True)
        except Problem as problem:
            raise HostFailure(f"The token cannot be used: {problem.detail}") from None
        client = self._egress.client("github", total_seconds=CALL_SECONDS, max_bytes=DIFF_BYTES + 1)
        return RepositoryClient(client, f"{repository.api_url}/repos/{repository.name}", token, self._redactor)


class RepositoryClient:
    """A client for the part of the code host's API that concerns one repository."""

    def __init__(self, client: httpx2.AsyncClient, base: str, token: str, redactor: Redactor) -> None:
        self._client, self._base, self._redactor = client, base, redactor
        self._headers = {"Authorization": f"Bearer {token}", "X-GitHub-Api-Version": API_VERSION}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def pull(self, number: int) -> Json:
        """Return a pull request."""
        return self._object(await self._call("GET", f"/pulls/{number}"))

    async def diff(self, number: int) -> str:
        """Return the diff of a pull request. Raise `DiffTooLarge` if the diff is too large."""
        try:
            answer = await self._call("GET", f"/pulls/{number}", accept="application/vnd.github.diff")
        except HostRefusal as refusal:
            if refusal.status in (406, 413):  # GitHub answers 406 if a diff has too many lines or files
                raise DiffTooLarge(refusal.detail) from None
            raise
        if is_truncated(answer) or len(answer.content) > DIFF_BYTES:
            raise DiffTooLarge(f"The diff is larger than {DIFF_BYTES // MIB} MiB.")
        return answer.content.decode(errors="replace")

    async def post_review(self, number: int, review: Json) -> str:
        """Post a review of a pull request, and return the URL of the review."""
        return _html_url(self._object(await self._call("POST", f"/pulls/{number}/reviews", body=review)))

    async def post_comment(self, number: int, text: str) -> str:
        """Post a comment on an issue or a pull request, and return the URL of the comment."""
        return _html_url(self._object(await self._call("POST", f"/issues/{number}/comments", body={"body": text})))

    async def find_review(self, number: int, marker: str) -> str | None:
        """Return the URL of the review that contains the marker, or None if there is none."""
        return await self._find(f"/pulls/{number}/reviews", marker)

    async def find_comment(self, number: int, marker: str, since: str) -> str | None:
        """Return the URL of the comment that contains the marker and is newer than `since`.

        Return None if there is no such comment.
        """
        return await self._find(f"/issues/{number}/comments", marker, since=since)

    async def _find(self, path: str, marker: str, **query: Any) -> str | None:
        async for item in self._items(path, query):
            if marker in str(item.get("body") or ""):
                return _html_url(item)
        return None

    async def _items(self, path: str, query: Json) -> AsyncIterator[Json]:
        for page in range(1, MAX_PAGES + 1):
            answer = await self._call("GET", path, query={**query, "per_page": PAGE_SIZE, "page": page})
            found = self._decoded(answer)
            if not isinstance(found, list):
                raise HostFailure("GitHub answered with something other than a list.")
            for item in found:
                if isinstance(item, dict):
                    yield item
            if len(found) < PAGE_SIZE:
                return
        raise HostFailure(f"The list has more than {MAX_PAGES * PAGE_SIZE} entries, which is too many to search.")

    async def _call(
        self,
        method: str,
        path: str,
        *,
        accept: str = "application/vnd.github+json",
        query: Json | None = None,
        body: Json | None = None,
    ) -> httpx2.Response:
        import httpx2

        headers = {**self._headers, "Accept": accept, "User-Agent": "corral-github"}
        content = None
        if body is not None:
            content, headers["Content-Type"] = msgspec.json.encode(body), "application/json"
        try:
            answer = await self._client.request(
                method, f"{self._base}{path}", headers=headers, params=query, content=content, follow_redirects=False
            )
        except EgressBlocked as blocked:
            raise HostFailure(f"The connection is not allowed: {blocked.reason}") from None
        except Unresolved:
            raise HostFailure("The host name of the GitHub API does not resolve.") from None
        except httpx2.HTTPError as error:
            raise HostFailure(f"GitHub did not answer: {str(error) or type(error).__name__}.") from None
        if answer.is_success:
            return answer
        raise self._failure(answer)

    def _failure(self, answer: httpx2.Response) -> HostFailure | HostRefusal:
        status, told = answer.status_code, self._error_detail(answer)
        detail = f"GitHub answered with the status {status}" + (f": {told}" if told else ".")
        pause = _pause_seconds(answer)
        if status == 429 or (status == 403 and pause is not None):
            return HostFailure(detail, pause if pause is not None else 60.0)
        if status >= 500 or status in LATER:
            return HostFailure(detail, pause)
        return HostRefusal(status, detail)

    def _error_detail(self, answer: httpx2.Response) -> str:
        """Return the code host's error message, shortened to one line."""
        try:
            found = parse_json(answer.content[:10_000], lenient=True)
        except Problem:
            return ""
        told = found.get("message") if isinstance(found, dict) else None
        return self._redactor.redact(" ".join(told.split()))[:200] if isinstance(told, str) else ""

    def _object(self, answer: httpx2.Response) -> Json:
        found = self._decoded(answer)
        if not isinstance(found, dict):
            raise HostFailure("GitHub answered with something other than an object.")
        return found

    @staticmethod
    def _decoded(answer: httpx2.Response) -> Any:
        try:
            return parse_json(answer.content, lenient=True)
        except Problem:
            raise HostFailure("GitHub answered with something other than JSON.") from None


def _html_url(found: Json) -> str:
    return str(found.get("html_url") or "")[:1000]


def _pause_seconds(answer: httpx2.Response) -> float | None:
    """Return how many seconds to wait: the time in `Retry-After`, or the time until the rate limit is reset.

    Return None if the response asks for no pause.
    """
    after = answer.headers.get("retry-after", "")
    if after.isdecimal():
        return min(float(after), MAX_PAUSE_SECONDS)
    ends = answer.headers.get("x-ratelimit-reset", "")
    if answer.headers.get("x-ratelimit-remaining") == "0" and ends.isdecimal():
        return min(max(1.0, float(ends) - clock.time_s()), MAX_PAUSE_SECONDS)
    return None
