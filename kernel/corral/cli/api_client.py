"""The HTTP client that commands use to call a running server. It uses the public API only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

from corral.http.routes import API_PREFIX

REQUEST_SECONDS, POLL_SECONDS = 30.0, 10
MAX_OUTAGE_SECONDS, RETRY_SECONDS = 30.0, 0.5
MIN_OVERLAP = 20


class ApiClientError(Exception):
    """Raised when the server refused a request or did not answer (`status` is None). The message is shown to users."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class ApiClient:
    """An API client for one server. `token` is a bearer credential. Failed requests raise `ApiClientError`."""

    def __init__(self, url: str, token: str | None = None) -> None:
        import httpx2

        self.url = url.rstrip("/")
        host = urlsplit(self.url).hostname or ""
        loopback = host in ("localhost", "::1") or host.startswith("127.")
        base, trust_env = self.url + API_PREFIX, not loopback  # servers on this machine are reached without a proxy
        self._http = httpx2.Client(base_url=base, timeout=REQUEST_SECONDS, trust_env=trust_env, follow_redirects=False)
        self._errors = httpx2.HTTPError
        if token is not None:
            self.set_token(token)

    def set_token(self, token: str) -> None:
        """Send this token with all further requests."""
        self._http.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close all connections to the server."""
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """Send a GET request and return the decoded JSON of the response."""
        return self._request("GET", path, params=query)

    def post(self, path: str, body: Any) -> Any:
        """Send a POST request with `body` as JSON and return the decoded JSON of the response."""
        content, headers = msgspec.json.encode(body), {"Content-Type": "application/json"}
        return self._request("POST", path, content=content, headers=headers)

    def events(
        self, kind: str, identifier: str, *, until: float | None = None, away: Callable[[str], None] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(event, data)` for each past event of one object, and then for each new event as it happens.

        The iterator never ends by itself. At the time `until` (in `time.monotonic` seconds), it raises
        `ApiClientError`. During an outage of up to `MAX_OUTAGE_SECONDS`, requests are retried. When an outage begins,
        `away` is called with the reason.
        """
        place, heard, waits = dict[str, Any](), time.monotonic(), False  # without a place: from the start of the log
        while until is None or time.monotonic() < until:
            wait = POLL_SECONDS if until is None else min(POLL_SECONDS, max(1, round(until - time.monotonic())))
            try:
                page = self.get("/events", object_type=kind, object_id=identifier, wait=wait, **place)
            except ApiClientError as error:
                is_away = error.status in (None, 502, 503, 504)
                if not is_away or time.monotonic() - heard > MAX_OUTAGE_SECONDS:
                    raise
                if away is not None and not waits:
                    away(str(error))
                waits = True
                time.sleep(RETRY_SECONDS)
                continue
            heard, waits = time.monotonic(), False
            for item in page["items"]:
                yield item["event"], item["data"]
            place["after"] = page["next"]
        raise ApiClientError("waiting for the events took too long")

    def _request(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._http.request(method, path, **options)
        except self._errors as error:
            raise ApiClientError(f"{self.url} does not answer: {type(error).__name__} {error}") from None
        if answer.status_code >= 400:
            raise ApiClientError(_refusal(answer.status_code, answer.content, f"{method} {path}"), answer.status_code)
        try:
            return msgspec.json.decode(answer.content) if answer.content else None
        except msgspec.DecodeError:
            detail = f"the response of {self.url} is not JSON; check that this is the address of a Corral server"
            raise ApiClientError(detail) from None


class TextDeltaTracker:
    """Finds the new part of a growing text, such as a model's reply, when the server sends only the end of the text."""

    def __init__(self) -> None:
        self._shown = ""

    def add(self, end: str) -> tuple[bool, str]:
        """Add the end of the text, as the server sent it. Return whether it overlaps the old text, and the new part."""
        if self._shown and end.startswith(self._shown):
            overlap = len(self._shown)
        else:
            sizes = range(min(len(end), len(self._shown)), MIN_OVERLAP - 1, -1)
            overlap = next((size for size in sizes if self._shown.endswith(end[:size])), 0)
        fresh = end[overlap:]
        self._shown = self._shown + fresh if overlap else end
        return overlap > 0, fresh


def _refusal(status: int, content: bytes, request: str) -> str:
    """Format a problem document as one line."""
    try:
        problem = msgspec.json.decode(content)
        said = [problem["detail"], *(f"{entry['pointer']}: {entry['detail']}" for entry in problem.get("errors") or ())]
    except (msgspec.DecodeError, KeyError, TypeError):
        said = [content[:300].decode("utf-8", "replace")]
    return f"{request}: {status} {'; '.join(said)}"
