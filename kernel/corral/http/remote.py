"""What a command says to a running server: over its public API and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import msgspec

BASE = "/api/v1"
CALL_SECONDS, POLL_SECONDS = 30.0, 10
PATIENCE_SECONDS, PAUSE_SECONDS = 30.0, 0.5
MIN_OVERLAP = 20


class RemoteError(Exception):
    """The server refused, or did not answer (`status` None); the message is for people."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class Remote:
    """A client of one server; `token` is any credential that goes behind `Bearer`. Calls raise `RemoteError`."""

    def __init__(self, url: str, token: str | None = None) -> None:
        import httpx2

        self.url = url.rstrip("/")
        host = urlsplit(self.url).hostname or ""
        loopback = host in ("localhost", "::1") or host.startswith("127.")
        self._http = httpx2.Client(
            base_url=self.url + BASE, timeout=CALL_SECONDS, trust_env=not loopback, follow_redirects=False
        )
        self._errors = httpx2.HTTPError
        if token is not None:
            self.use(token)

    def use(self, token: str) -> None:
        """Later calls carry this credential."""
        self._http.headers["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        """GET; the parsed answer."""
        return self._call("GET", path, params=query)

    def post(self, path: str, body: Any) -> Any:
        """POST; the parsed answer."""
        return self._call("POST", path, content=msgspec.json.encode(body), headers={"Content-Type": "application/json"})

    def events(
        self, kind: str, identifier: str, *, until: float | None = None, away: Callable[[str], None] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """`(event, data)` of one object as they happen, from its first on, without end.

        A server that is away for less than half a minute is waited for, and `away` told why when that begins. `until`:
        a `time.monotonic` after which `RemoteError` is raised.
        """
        place, heard, waits = dict[str, Any](), time.monotonic(), False  # no place: from what the log still keeps
        while until is None or time.monotonic() < until:
            wait = POLL_SECONDS if until is None else min(POLL_SECONDS, max(1, round(until - time.monotonic())))
            try:
                page = self.get("/events", object_type=kind, object_id=identifier, wait=wait, **place)
            except RemoteError as error:
                is_away = error.status in (None, 502, 503, 504)
                if not is_away or time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
                if away is not None and not waits:
                    away(str(error))
                waits = True
                time.sleep(PAUSE_SECONDS)
                continue
            heard, waits = time.monotonic(), False
            for item in page["items"]:
                yield item["event"], item["data"]
            place["after"] = page["next"]
        raise RemoteError("it took too long")

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            answer = self._http.request(method, path, **options)
        except self._errors as error:
            raise RemoteError(f"{self.url} does not answer: {type(error).__name__} {error}") from None
        if answer.status_code >= 400:
            raise RemoteError(_refusal(answer.status_code, answer.content, f"{method} {path}"), answer.status_code)
        try:
            return msgspec.json.decode(answer.content) if answer.content else None
        except msgspec.DecodeError:
            raise RemoteError(f"{self.url} answers no JSON: is this the address of a Corral server?") from None


class LiveText:
    """A text that is told by its growing end: a task's progress while a model writes."""

    def __init__(self) -> None:
        self._shown = ""

    def add(self, end: str) -> tuple[bool, str]:
        """Whether `end` goes on from what was there, and what of it is new."""
        shown, fresh = self._shown, end
        goes_on = bool(shown) and end.startswith(shown)
        if goes_on:
            fresh = end[len(shown) :]
        else:
            for size in range(min(len(end), len(shown)), MIN_OVERLAP - 1, -1):
                if shown.endswith(end[:size]):
                    goes_on, fresh = True, end[size:]
                    break
        self._shown = shown + fresh if goes_on else end
        return goes_on, fresh


def _refusal(status: int, content: bytes, call: str) -> str:
    """The problem document in one line."""
    try:
        problem = msgspec.json.decode(content)
        said = [problem["detail"], *(f"{entry['pointer']}: {entry['detail']}" for entry in problem.get("errors") or ())]
    except (msgspec.DecodeError, KeyError, TypeError):
        said = [content[:300].decode("utf-8", "replace")]
    return f"{call}: {status} {'; '.join(said)}"
