"""`corral tasks watch` when the server refuses, stops or cannot be reached: one sentence, and never a traceback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from corral.cli import api_client
from corral.cli.api_client import ApiClient, ApiClientError
from corral_plugins.tasks.commands import following
from corral_plugins.tasks.commands.following import EventPrinter, follow_task

pytestmark = pytest.mark.one_engine

TASK = "0190a0b0-0000-7000-8000-000000000000"
STARTED = {"seq": 1, "ts": "2026-01-01T00:00:00.000Z", "event": "task.started", "data": {"status": "running"}}
ENDED = {**STARTED, "seq": 2, "event": "task.failed", "data": {"status": "failed"}}


class Broken(ThreadingHTTPServer):
    """Answers the first request for events, and handles every later request as `breaks` says."""

    daemon_threads = True

    def __init__(self, breaks: Callable[[Answer], None], events: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.breaks, self.events, self.asked = breaks, events, 0


class Answer(BaseHTTPRequestHandler):
    """Handles one request."""

    server: Broken

    def do_GET(self) -> None:
        is_for_events = "/events?" in self.path
        self.server.asked += is_for_events
        if is_for_events and self.server.asked == 1:
            self.send(200, {"items": self.server.events, "next": "1"})
        else:
            self.server.breaks(self)

    def send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("content-type", "application/json"), ("x-request-id", "r"), ("content-length", len(data))):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str, detail: str) -> None:
        self.send(status, {"title": "Refused", "status": status, "code": code, "detail": detail, "request_id": "r"})

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def cut(answer: Answer) -> None:
    """End the connection in the middle of the body."""
    answer.send_response(200)
    answer.send_header("content-length", "1000")
    answer.end_headers()
    answer.wfile.write(b'{"items": [')
    answer.close_connection = True


CASES: dict[str, tuple[Callable[[Answer], None], str]] = {
    "not signed in": (lambda it: it.refuse(401, "unauthenticated", "The session has ended."), "The session has ended"),
    "no such task": (lambda it: it.refuse(404, "not_found", "No task."), "was deleted; `corral tasks list` shows all"),
    "server is stopping": (lambda it: it.refuse(503, "shutting_down", "The server stops."), "The server stops"),
    "connection is cut": (cut, "does not answer: "),
    "no JSON": (lambda it: it.send_error(200, "hello"), "is not a Corral server; check the address"),
}


@pytest.fixture(autouse=True)
def no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up at once, and look for obstacles all the time, as the thread does that shares the connection."""
    monkeypatch.setattr(api_client, "MAX_OUTAGE_SECONDS", -1.0)
    monkeypatch.setattr(following, "OBSTACLES_SECONDS", 0.0)


@pytest.fixture
def serve() -> Iterator[Callable[..., ApiClient]]:
    """Start a server that breaks, and return a client for it."""
    servers: list[Broken] = []

    def start(breaks: Callable[[Answer], None], *events: Any) -> ApiClient:
        server = Broken(breaks, list(events))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return ApiClient(f"http://127.0.0.1:{server.server_port}", "token")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("event", [STARTED, ENDED], ids=["running", "ended"])
def test_each_way_to_break_is_a_sentence(
    serve: Callable[..., ApiClient],
    case: str,
    event: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    breaks, told = CASES[case]
    with serve(breaks, event) as client, pytest.raises(ApiClientError) as caught:
        follow_task(client, TASK, EventPrinter(quiet=False), as_json=False)
    assert told in str(caught.value)
    assert TASK in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_an_outage_in_any_request_is_waited_out(
    serve: Callable[..., ApiClient], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server stops right after it told the end of the task, and answers again later."""
    monkeypatch.setattr(api_client, "MAX_OUTAGE_SECONDS", 300.0)
    monkeypatch.setattr(api_client, "RETRY_SECONDS", 0.01)
    cost = {"input_tokens": 1, "output_tokens": 1, "calls": 1, "cost_usd": 0.0, "unpriced_tokens": 0}
    task = {"id": TASK, "status": "completed", "result": {"text": "done"}, "error": None, "cost": cost, "attempt": 1}
    moments = {"created_at": STARTED["ts"], "finished_at": STARTED["ts"]}
    refusals = iter(range(3))

    def stops_for_a_while(answer: Answer) -> None:
        if answer.path.endswith("/explain"):  # by the thread that looks for obstacles, as often as it can
            answer.send(200, {"status": "completed", "conditions": []})
        elif next(refusals, None) is not None:
            answer.refuse(503, "shutting_down", "The server stops.")
        elif "/events?" in answer.path:
            answer.send(200, {"items": [], "next": "2"})
        else:
            answer.send(200, {**task, **moments})

    with serve(stops_for_a_while, ENDED) as client, pytest.raises(SystemExit) as ended:
        follow_task(client, TASK, EventPrinter(quiet=False), as_json=False)
    told = capfd.readouterr()
    assert (ended.value.code, told.out) == (0, "done\n")
    assert " is stopping or restarting; waiting for the server, for up to 300 s" in told.err


def test_a_retry_is_told_with_its_cause(serve: Callable[..., ApiClient], capfd: pytest.CaptureFixture[str]) -> None:
    cause = {"type": "provider_error", "message": "openai: api.openai.com does not resolve"}
    attempts = [{"n": 1, "error": None}, {"n": 1, "error": cause}, {"n": 2, "error": {**cause, "message": "later"}}]
    data = {"status": "pending", "source": "policy", "attempt": 1, "reason": "provider_error"}
    by_person = {**data, "source": "person", "reason": "again"}

    def knows_the_attempts(answer: Answer) -> None:
        if answer.path.split("?")[0].endswith("/attempts"):
            answer.send(200, {"items": attempts, "next": None})
        else:
            answer.refuse(404, "not_found", "No task.")

    retries = [{**STARTED, "event": "task.retried", "data": each} for each in (data, by_person)]
    with serve(knows_the_attempts, *retries) as client, pytest.raises(ApiClientError):
        follow_task(client, TASK, EventPrinter(quiet=False), as_json=False)
    told = [line.split(" s  ", 1)[1] for line in capfd.readouterr().err.splitlines() if "retried" in line]
    assert told == ["retried    provider_error: openai: api.openai.com does not resolve", "retried    again"]
