"""A server that answers like the REST API of GitHub, from the recordings in `recordings`, and keeps what was posted.

It runs in a thread of its own, so that tests can stop, restart or block it while the code under test is busy.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

RECORDINGS = Path(__file__).parent / "recordings"
TOKEN, WEBHOOK_SECRET = "ghx-token-of-the-tests", "secret-of-the-webhook"
PULL = re.compile(r"/repos/octo/hello/pulls/(\d+)")
REVIEWS = re.compile(r"/repos/octo/hello/pulls/(\d+)/reviews")
COMMENTS = re.compile(r"/repos/octo/hello/issues/(\d+)/comments")
LINES_OF_DIFF = {"RIGHT": {1, 2, 3, 4, 5}, "LEFT": {1, 2, 3, 4}}


def recorded(name: str) -> Any:
    """Return a recording."""
    return json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))


class RecordedGitHub:
    """The state of the server: pull requests that tests change, and the reviews and comments that were posted.

    `refusals` are the next answers, as `(status, headers)`, instead of those of the API. `lose_next` closes the
    connection of the next post after it was stored. While `hold` is set, posts are stored and not answered; `held`
    tells of one.
    """

    def __init__(self) -> None:
        self.head_sha = recorded("pull_request")["head"]["sha"]
        self.diff: bytes = (RECORDINGS / "pull_request.diff").read_bytes()
        self.pull: dict[str, Any] = {}
        self.reviews: list[dict[str, Any]] = []
        self.comments: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.is_down = self.lose_next = self.is_own_pull = self.is_diff_refused = False
        self.hold, self.held, self.go_on = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def posts(self) -> list[dict[str, Any]]:
        return [*self.reviews, *self.comments]

    @contextmanager
    def running(self) -> Iterator[RecordedGitHub]:
        state = self

        class Handler(_Handler):
            github = state

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.go_on.set()
            server.shutdown()
            server.server_close()

    def answer(self, method: str, target: str, headers: Any, body: Any) -> tuple[int, dict[str, str], bytes]:
        """Return the status, the headers and the body of an answer."""
        with self._lock:
            path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
            self.requests.append(f"{method} {path}")
            if self.is_down:
                return self._error(503)
            if self.refusals:
                status, extra = self.refusals.pop(0)
                return self._error(status, extra)
            if headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._error(401)
            if not headers.get("User-Agent") or headers.get("X-GitHub-Api-Version") != "2022-11-28":
                return self._error(403)
            return self._route(method, path, query, headers.get("Accept", ""), body)

    def _route(self, method: str, path: str, query: Any, accept: str, body: Any) -> tuple[int, dict[str, str], bytes]:
        if method == "GET" and (match := PULL.fullmatch(path)):
            if accept == "application/vnd.github.diff" and self.is_diff_refused:
                return self._error(406)
            if accept == "application/vnd.github.diff":
                return 200, {"Content-Type": "application/vnd.github.diff; charset=utf-8"}, self.diff
            found = recorded("pull_request") | {"number": int(match[1])} | self.pull
            found["head"] = found["head"] | {"sha": self.head_sha}
            return self._json(200, found)
        for pattern, kept in ((REVIEWS, self.reviews), (COMMENTS, self.comments)):
            if not (match := pattern.fullmatch(path)):
                continue
            if method == "POST":
                return self._post(kept, int(match[1]), body)
            size, page = int(query["per_page"][0]), int(query["page"][0])
            mine = [each for each in kept if each["number"] == int(match[1])]
            return self._json(200, mine[(page - 1) * size : page * size])
        return self._error(404)

    def _post(self, kept: list[dict[str, Any]], number: int, body: Any) -> tuple[int, dict[str, str], bytes]:
        name = "comment"
        if kept is self.reviews:
            name = "review"
            if body["event"] not in ("APPROVE", "REQUEST_CHANGES", "COMMENT"):
                return self._error(422)
            if self.is_own_pull and body["event"] != "COMMENT":
                return self._error(422)
            for each in body.get("comments", ()):
                if each["path"] != "hello.py" or each["line"] not in LINES_OF_DIFF[each["side"]]:
                    return self._error(422)
        if not body.get("body") or len(body["body"]) > 65_536:
            return self._error(422)
        made = recorded(name) | {"id": len(kept) + 1, "number": number} | body
        kept.append(made)
        return self._json(200 if name == "review" else 201, made)

    @staticmethod
    def _json(status: int, value: Any) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode()

    def _error(self, status: int, extra: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        _, headers, body = self._json(status, recorded("errors").get(str(status), {}))
        return status, {**headers, **(extra or {})}, body


class _Handler(BaseHTTPRequestHandler):
    github: RecordedGitHub

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.loads(content))

    def _answer(self, body: Any) -> None:
        status, headers, content = self.github.answer(self.command, self.path, self.headers, body)
        if self.command == "POST" and status < 300:
            if self.github.hold.is_set():
                self.github.held.set()
                self.github.go_on.wait(60)
            if self.github.lose_next:
                self.github.lose_next = False
                self.close_connection = True
                return
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
