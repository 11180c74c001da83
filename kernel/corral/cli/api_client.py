"""The HTTP client that commands use to call a running server. It uses the public API only."""

from __future__ import annotations

import contextlib
import math
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, BinaryIO, Self
from urllib.parse import quote, urlsplit

import msgspec

from corral.http.routes import API_PREFIX
from corral.ids import parse_id

if TYPE_CHECKING:
    import httpx2

REQUEST_SECONDS, POLL_SECONDS = 30.0, 10
MAX_OUTAGE_SECONDS, RETRY_SECONDS = 120.0, 0.5
AWAY = (None, 502, 503, 504)  # what a server answers that stops, starts or is not there, or the proxy before it
MIN_OVERLAP = 20
PAGE = 200  # items


class ApiClientError(Exception):
    """Raised when the server refuses a request or does not answer. The message is shown to users.

    `status` is None if the server did not answer.
    """

    def __init__(self, message: str, status: int | None = None, problem: Mapping[str, Any] | None = None) -> None:
        self.status, self.problem = status, problem or {}
        self.code = str(self.problem.get("code", ""))
        super().__init__(message)


class ApiClientTimeout(ApiClientError):
    """Raised when the expected event has not occurred in time."""


class ApiClient:
    """An API client for one server. `token` is a bearer credential. Failed requests raise `ApiClientError`.

    After a response with status 401 or 403, `on_refusal` is called with the error. If it returns true, for example
    because it renewed the token, the request is sent once more.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        import httpx2

        self.url, self.token = url.rstrip("/"), token
        self.on_refusal: Callable[[ApiClientError], bool] = lambda error: False
        self._on_outage: Callable[[str], None] | None = None
        self._me: Any = None
        self._until: float | None = None
        address = urlsplit(self.url)
        host = address.hostname or ""
        loopback = host in ("localhost", "::1") or host.startswith("127.")
        trust_env = not loopback  # servers on this machine are reached without a proxy
        headers = {"User-Agent": f"corral/{version('corral')}"}
        # Reading the certificates of the authorities takes longer than most commands, and `http` trusts none of them.
        verify = address.scheme != "http" or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._http = httpx2.Client(
            base_url=self.url, headers=headers, timeout=REQUEST_SECONDS, trust_env=trust_env, verify=verify
        )
        self._errors = (httpx2.HTTPError, httpx2.InvalidURL)

    def set_token(self, token: str) -> None:
        """Send this token with all further requests."""
        self.token, self._me = token, None

    def close(self) -> None:
        """Close all connections to the server."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str, **query: Any) -> Any:
        """Send a GET request and return the decoded JSON of the response."""
        began: float | None = None
        while True:
            try:
                return self.send("GET", path, query=query)
            except ApiClientError as error:
                now = time.monotonic()
                if self._on_outage is None or error.status not in AWAY or now > (self._until or math.inf):
                    raise
                if began is None:
                    began = now
                    why = f"{self.url} is stopping or restarting" if error.code == "shutting_down" else str(error)
                    self._on_outage(f"{why}; waiting for the server, for up to {MAX_OUTAGE_SECONDS:g} s")
                if now - began > MAX_OUTAGE_SECONDS:
                    raise
                time.sleep(RETRY_SECONDS)

    def me(self) -> Any:
        """Return the caller's account and permissions, which are requested only once."""
        if self._me is None:
            self._me = self.get("/auth/me")
        return self._me

    @contextlib.contextmanager
    def waiting_out_outages(self, away: Callable[[str], None], *, until: float | None = None) -> Iterator[None]:
        """Repeat GET requests in the `with` block while the server does not answer, for example during a restart.

        When an outage begins, `away` is called with the reason. If the outage lasts longer than `MAX_OUTAGE_SECONDS`,
        or past the time `until` (in `time.monotonic` seconds), the error from the last request is raised.
        """
        before = self._on_outage, self._until
        self._on_outage, self._until = away, until
        try:
            yield
        finally:
            self._on_outage, self._until = before

    def post(self, path: str, body: Any) -> Any:
        """Send a POST request with `body` as JSON and return the decoded JSON of the response."""
        return self.send("POST", path, body=body)

    def send(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request and return the decoded JSON of the response, or its text if it is not JSON.

        `path` is relative to the API, for example `/agents`. The names of `headers` are in lower case.
        """
        content = None if body is None else msgspec.json.encode(body)
        sent = {**({} if content is None else {"content-type": "application/json"}), **(headers or {})}
        try:
            answer = self._send_once(method, path, query or {}, content, sent)
        except ApiClientError as error:
            if error.status not in (401, 403) or not self.on_refusal(error):
                raise
            answer = self._send_once(method, path, query or {}, content, sent)
        if not answer.content:
            return None
        if answer.headers.get("content-type", "").partition(";")[0] == "application/json":
            with contextlib.suppress(msgspec.DecodeError):
                return msgspec.json.decode(answer.content)
        elif "x-request-id" in answer.headers:
            return answer.text
        raise ApiClientError(f"{self.url} is not a Corral server; check the address")

    def upload(
        self, path: str, file: BinaryIO, name: str, *, query: Mapping[str, Any], fields: Mapping[str, str]
    ) -> Any:
        """Send a file as the part `file` of a multipart/form-data body, and return the decoded JSON of the response.

        The file is read while it is sent. The `fields` are sent as text parts.
        """

        def send() -> Any:
            address, headers = self._api_path(path), self._headers({})
            parts = {"file": (name, file)}
            try:
                answer = self._http.post(address, params=dict(query), data=dict(fields), files=parts, headers=headers)
            except self._errors as error:
                raise ApiClientError(f"{self.url} does not answer: {_reason(error)}") from None
            return msgspec.json.decode(self._require_success(path, answer).content)

        try:
            return send()
        except ApiClientError as error:
            if error.status not in (401, 403) or not file.seekable() or not self.on_refusal(error):
                raise
        file.seek(0)
        return send()

    def download(self, path: str, **query: Any) -> Iterator[bytes]:
        """Send a GET request and yield the bytes of the response as they arrive."""
        try:
            yield from self._stream(path, query)
        except ApiClientError as error:
            if error.status not in (401, 403) or not self.on_refusal(error):
                raise
            yield from self._stream(path, query)

    def _stream(self, path: str, query: Mapping[str, Any]) -> Iterator[bytes]:
        address, headers = self._api_path(path), self._headers({})
        try:
            with self._http.stream("GET", address, params=dict(query), headers=headers) as answer:
                if not answer.is_success:
                    answer.read()
                yield from self._require_success(path, answer).iter_bytes()
        except self._errors as error:
            raise ApiClientError(f"{self.url} does not answer: {_reason(error)}") from None

    def pages(self, path: str, **query: Any) -> Iterator[Any]:
        """Yield all items of a list. Further pages are requested as needed."""
        query.setdefault("limit", PAGE)
        position = "after" if path.strip("/") == "events" else "cursor"
        while True:
            page = self.get(path, **query)
            yield from page["items"]
            if not page.get("next") or not page["items"]:
                return
            query[position] = page["next"]

    def find(self, path: str, name: str, *, kind: str, field: str = "name", listing: str | None = None) -> Any:
        """Return the object in the list at `path` whose id or name is `name`. Names are compared case-insensitively.

        `kind` is the noun for the error messages, such as "agent". `field` is the field that contains the name.
        `listing` is the command that lists the objects. For the kind `agent`, it defaults to `corral agents list`.
        """
        if parse_id(name) is not None:
            try:
                return self.get(f"{path}/{name}")
            except ApiClientError as error:
                if error.status != 404:
                    raise
        found = self.get(path, search=name, limit=PAGE)["items"] if name.strip() and len(name) <= PAGE else []
        same = [item for item in found if item[field].casefold() == name.strip().casefold()]
        if len(same) == 1:
            return same[0]
        if same:
            ids = ", ".join(item["id"] for item in same)
            raise ApiClientError(f"{len(same)} {_plural(kind)} are named {name}; give one of these ids instead: {ids}")
        similar = found[0][field] if found else self._similar_name(path, name, field)
        plural = _plural(kind)
        hint = f" at {self.url}; {listing or f'corral {plural} list'} shows all {plural}"
        raise ApiClientError(f"there is no {kind} named {name}{f'; did you mean {similar}?' if similar else hint}", 404)

    def others_of_name(self, path: str, made: Mapping[str, Any]) -> list[str]:
        """Return the ids of the other objects in the list at `path` with the same name as the new object `made`."""
        same = self.get(path, search=made["name"], limit=PAGE)["items"]
        wanted = made["name"].casefold()
        return [each["id"] for each in same if each["name"].casefold() == wanted and each["id"] != made["id"]]

    @contextlib.contextmanager
    def explain_not_found(self, kind: str, identifier: str, listing: str) -> Iterator[None]:
        """Name the requested object in the error if a request in the `with` block fails with status 404.

        `kind` is the noun for the error message, and `listing` is the command that lists the objects.
        """
        try:
            yield
        except ApiClientError as error:
            if error.status != 404:
                raise
            told = f"there is no {kind} {identifier} at {self.url}; {listing} lists every {kind}"
            raise ApiClientError(told, 404, error.problem) from None

    def _similar_name(self, path: str, name: str, field: str) -> str | None:
        """Return the name most similar to a mistyped name, from the first page of the list at `path`, or None."""
        from difflib import get_close_matches

        names = {item[field].casefold(): item[field] for item in self.get(path, limit=PAGE)["items"]}
        near = get_close_matches(name.strip().casefold(), names, n=1)
        return names[near[0]] if near else None

    def events(self, kind: str, identifier: str, *, until: float | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(event, data)` for each past event of one object, and then for each new event as it happens.

        For `until`, see `follow_events`.
        """
        for item in self.follow_events(until=until, object_type=kind, object_id=identifier):
            yield item["event"], item["data"]

    def follow_events(self, *, until: float | None = None, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield each past event that `GET /events` returns for `query`, and then each new event as it happens.

        The iterator never ends on its own. At the time `until` (in `time.monotonic` seconds), it raises
        `ApiClientTimeout`.
        """
        while until is None or time.monotonic() < until:
            wait = POLL_SECONDS if until is None else min(POLL_SECONDS, max(1, round(until - time.monotonic())))
            page = self.get("/events", **query, wait=wait)
            yield from page["items"]
            query["after"] = page["next"]
        raise ApiClientTimeout("timed out before the expected event occurred")

    def absolute(self, address: str) -> str:
        """Return `address` as an absolute URL.

        A server without a public URL returns URLs without a host. This method adds the host of the server.
        """
        return f"{self.url}{address}" if address.startswith("/") else address

    def _send_once(
        self, method: str, path: str, query: Mapping[str, Any], content: bytes | None, headers: dict[str, str]
    ) -> httpx2.Response:
        """Send a request once and return the response. Raise `ApiClientError` unless the request succeeds."""
        try:
            answer = self._http.request(
                method, self._api_path(path), params=dict(query), content=content, headers=self._headers(headers)
            )
        except self._errors as error:
            raise ApiClientError(f"{self.url} does not answer: {_reason(error)}") from None
        return self._require_success(path, answer)

    @staticmethod
    def _api_path(path: str) -> str:
        return API_PREFIX + quote(path, safe="/%:@!$&'()*+,;=~")

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {**headers, **({} if self.token is None else {"Authorization": f"Bearer {self.token}"})}

    def _require_success(self, path: str, answer: httpx2.Response) -> httpx2.Response:
        """Return the response if its status indicates success, otherwise raise `ApiClientError`."""
        if answer.is_success:
            return answer
        if "x-request-id" in answer.headers:
            raise _problem_error(path, answer.status_code, answer.content)
        if answer.status_code in (502, 503, 504):
            told = f"the proxy at {self.url} answered {answer.status_code}; check that the server behind it runs"
        else:
            told = f"{self.url} is not a Corral server (it answered {answer.status_code}); check the address"
        raise ApiClientError(told, answer.status_code)


def _reason(error: Exception) -> str:
    """Describe why a server did not answer, and suggest a remedy."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        told = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0] or "it is not trusted"
        return f"its TLS certificate was refused: {told}; set SSL_CERT_FILE to the certificate of its authority"
    if "SSL" in text:
        return "it does not speak TLS on this port; try http:// instead of https://"
    if "Connection refused" in text:
        return "connection refused; check the address, or start the server with `corral serve`"
    if type(error).__name__.endswith("Timeout"):
        return f"no answer within {REQUEST_SECONDS:g} s; check the address and the network"
    return f"{text.rstrip('.') or type(error).__name__}; check the address and the network"


def _plural(noun: str) -> str:
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


class TextDeltaTracker:
    """Finds the new part of a growing text, such as a model's reply.

    The server does not send the whole text each time, but only the end of it, after "… ".
    """

    def __init__(self) -> None:
        self._shown = ""

    def add(self, end: str) -> tuple[bool, str]:
        """Record `end`, the end of the text as the server last sent it.

        Return whether `end` overlaps the text received so far, and the part of `end` that is new.
        """
        if self._shown and end.startswith(self._shown):
            overlap = len(self._shown)
        else:
            rest = end.removeprefix("… ")
            sizes = range(min(len(rest), len(self._shown)), MIN_OVERLAP - 1, -1)
            overlap = next((size for size in sizes if self._shown.endswith(rest[:size])), 0)
            end = rest if overlap else end
        fresh = end[overlap:]
        self._shown = self._shown + fresh if overlap else end
        return overlap > 0, fresh


def _problem_error(path: str, status: int, content: bytes) -> ApiClientError:
    """Return the error for a problem document.

    The message has one line for each item in the problem's `errors`. If an object was not found, the message names its
    path.
    """
    try:
        problem = msgspec.json.decode(content)
        faults = [(each["pointer"], each["detail"]) for each in problem.get("errors") or ()]
        lines = lines_of_faults(problem["detail"], problem["title"], faults)
    except (msgspec.DecodeError, KeyError, TypeError):
        return ApiClientError(content[:300].decode("utf-8", "replace") or f"the server answered {status}", status)
    if problem.get("code") == "not_found":
        lines[0] += f": {path}"
    if status >= 500:
        lines[0] += f" (status {status}, request {problem.get('request_id')})"
    return ApiClientError("\n".join(lines), status, problem)


def lines_of_faults(detail: str, title: str, faults: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines of an error message: a summary, followed by one line for each item of `faults`.

    An item contains the JSON pointer to an invalid value, and a text that says what is wrong with the value. A text
    that `detail` already contains is not repeated.
    """
    faults = [(pointer, text.rstrip(".")) for pointer, text in faults]
    repeats = any(text in detail for _, text in faults)
    if repeats and len(faults) == 1:
        faults, head = [], f"{faults[0][0]}: {detail}" if faults[0][0] else detail
    else:
        head = title if repeats else detail
    return [head.rstrip("."), *(f"  {pointer}: {text}" if pointer else f"  {text}" for pointer, text in faults)]
