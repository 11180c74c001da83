"""S7: marked secrets go through every feature there is; none is found anywhere afterwards, in any form.

Short form: 10 secrets; long form (`--long`): 500. Each is written by people, workers and models in plain, base64, hex
and URL form. Then everything that can hold text is searched: database (with WAL), files, logs, events, audit log, its
export, metrics, problem documents, answers, `/ws`. Features that come later join the corpus when they exist.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from websockets.sync.client import connect

from corral.database.connect import connect as open_database
from corral.testing.server import PASSWORD, ServerProcess

pytestmark = pytest.mark.one_engine

CONTROL = "mark-that-nobody-stored-0123456789"
MODEL = {"llm_provider": "scripted", "llm_model": "echo"}


def marked(n: int) -> str:
    """A secret that holds what is escaped in the one or the other form."""
    return f"mark<{n:04}>&{n * 7919 % 9973:04}/é+{'x' * (n % 7)}=Zq{n}"


def spellings(value: str) -> dict[str, str]:
    data = value.encode()
    return {
        "raw": value,
        "base64": base64.b64encode(data).decode(),
        "base64url": base64.urlsafe_b64encode(data).decode(),
        "shifted": base64.b64encode(b"key=" + data + b";").decode(),
        "hex": data.hex(),
        "HEX": data.hex().upper(),
        "url": quote(value, safe=""),
        "json": json.dumps(value)[1:-1],
    }


def traces(value: str) -> list[bytes]:
    """What gives the value away: each form; of base64 the part that surely is of the value."""
    found = {form.encode() for name, form in spellings(value).items() if name != "shifted"}
    found |= {form.rstrip(b"=") for form in set(found)}
    sure = spellings(value)["shifted"][6:-4]
    return [*found, sure.encode()]


class Frames(threading.Thread):
    """Everything that `/ws` tells an admin."""

    def __init__(self, address: str, token: str) -> None:
        super().__init__(daemon=True)
        self.heard: list[str] = []
        headers = {"Authorization": f"Bearer {token}"}
        self.socket = connect(f"{address.replace('http', 'ws')}/ws", additional_headers=headers, legacy=True)
        self.socket.send(json.dumps({"type": "subscribe", "event": "*"}))

    def run(self) -> None:
        try:
            for message in self.socket:
                self.heard.append(str(message))
        except Exception:
            return


class Tour:
    """Takes secrets through the product."""

    def __init__(self, server: ServerProcess, admin: httpx2.Client) -> None:
        self.server, self.admin = server, admin
        self.answers: list[bytes] = []
        self.worker_id, self.worker = self.machine()
        made = self.told("POST", "/agents", {"name": "runner", "max_concurrent_tasks": 100, **MODEL})
        assert "id" in made, str(made)
        self.agent_id = made["id"]
        self.told("POST", f"/agents/{self.agent_id}/start")

    def told(self, method: str, path: str, body: Any = None, *, by: httpx2.Client | None = None, **options: Any) -> Any:
        """A call, whatever it answers; the answer is kept for the search."""
        answer = (by or self.admin).request(method, path, json=body, **options)
        assert answer.status_code < 500, answer.text
        self.answers.append(answer.content + repr(dict(answer.headers)).encode())
        return answer.json() if answer.content and "json" in answer.headers["content-type"] else answer.text

    def machine(self) -> tuple[str, httpx2.Client]:
        """An approved worker of the group that may have the secrets."""
        made = self.admin.post("/workers/register", json={"name": "worker", "max_agents": 1000}).json()
        client = self.server.client(made["token"])
        for path, body in (("approve", {"is_approved": True}), ("", {"group": "farm"})):
            self.admin.patch(f"/admin/workers/{made['id']}/{path}".rstrip("/"), json=body).raise_for_status()
        client.post(f"/workers/{made['id']}/heartbeat", json={}).raise_for_status()
        return made["id"], client

    def store(self, n: int) -> dict[str, Any]:
        """The secret itself: created, read, written wrongly, rotated to itself, kept under a key."""
        value = marked(n)
        fields = {"allowed_consumers": ["worker_group:farm"], "allowed_hosts": ["example.org"], "description": "marked"}
        made = self.told("POST", "/secrets", {"name": f"MARK_{n}", "value": value, **fields})
        path = f"/secrets/{made['id']}"
        self.told("GET", path)
        self.told("POST", "/secrets", {"name": f"MARK_{n}", "value": value})
        self.told("POST", "/secrets", {"name": value, "value": value, "surprise": value})
        self.told("PUT", path, {"value": value, "cas": 99})
        self.told("POST", f"{path}/rotate", {"value": value, "grace_seconds": 60}, headers={"Idempotency-Key": f"k{n}"})
        if n == 0:  # the same value where other pages keep credentials
            self.told("PUT", "/settings/mail/password", {"value": value})
            self.told("POST", "/llm/providers", {"name": "kept", "kind": "anthropic", "api_key": value})
            self.told("GET", "/llm/providers/kept")
        return made  # type: ignore[no-any-return]

    def people(self, n: int) -> None:
        """What people write."""
        for text in spellings(marked(n)).values():
            task = self.told(
                "POST", "/tasks", {"title": text[:190], "instructions": text, "input": {text[:90]: [text]}}
            )
            self.told("PATCH", f"/tasks/{task['id']}", {"instructions": f"again {text}"})
            self.told("POST", f"/tasks/{task['id']}/comments", {"body": text})
            self.told("POST", f"/tasks/{task['id']}/cancel", {"reason": text})
        self.told("PATCH", f"/agents/{self.agent_id}", {"system_prompt": f"use {marked(n)}"})
        self.told("GET", f"/tasks?search={quote(marked(n), safe='')}") if n == 0 else None

    def worker_reports(self, n: int) -> None:
        """What a worker and its agent report, also the value that they were given."""
        value, forms = marked(n), spellings(marked(n))
        self.told("POST", "/tasks", {"title": f"work {n}", "agent_id": self.agent_id})
        claimed = self.worker.post(f"/workers/{self.worker_id}/claim", json={}).json()["tasks"]
        assert len(claimed) == 1
        task, lease = claimed[0]["task"]["id"], claimed[0]["lease_id"]

        def report(name: str, body: dict[str, Any]) -> Any:
            return self.told("POST", f"/tasks/{task}/{name}", {"lease_id": lease, **body}, by=self.worker)

        report("start", {})
        given = self.worker.post(f"/tasks/{task}/secrets/mark_{n}", json={"lease_id": lease, "purpose": "to build"})
        assert given.json()["value"] == value  # this one answer may hold it
        report("progress", {"percent": 5, "message": f"using {value}"[:500]})
        lines = [{"seq": seq, "ts": "2026-01-01T00:00:00Z", "message": text} for seq, text in enumerate(forms.values())]
        report("logs", {"entries": lines})
        report("checkpoint", {"step": 1, "state": {"forms": forms}})
        report("tools/http.fetch", {"call_id": "one", "arguments": {"url": f"http://example.org/{forms['url']}"}})
        agent = self.server.client(claimed[0]["agent_token"])
        self.chat(agent, value, by_agent=True)
        if n % 2:
            report("complete", {"result": {"said": forms}})
        else:
            report("fail", {"error": {"type": "broken", "message": value}, "retryable": False})
        self.told("GET", f"/tasks/{task}")
        self.told("GET", f"/tasks/{task}/logs")

    def chat(self, client: httpx2.Client, value: str, *, by_agent: bool = False) -> None:
        """A model that says everything again."""
        for stream in (False, True):
            for text in spellings(value).values():
                body = {"model": "scripted/echo", "messages": [{"role": "user", "content": f"say {text} now"}]}
                self.told("POST", "/llm/chat/completions", {**body, "stream": stream}, by=client)
            if by_agent:
                return

    def search(self, database_url: str, folder: Path, frames: Frames) -> Iterator[tuple[str, bytes]]:
        """Every place where text is kept or shown."""
        paths = [
            "/secrets?limit=200",
            "/secrets/expiring?days=365",
            "/tasks?limit=200",
            "/admin/audit?limit=200",
            "/admin/audit/export?format=jsonl",
            "/llm/calls?limit=200",
            "/settings",
            "/settings/health",
            "/plugins",
            f"/agents/{self.agent_id}",
            f"/agents/{self.agent_id}/versions",
            "/metrics",
            "/workers/overview",
        ]
        after = "0"
        while True:
            page = self.admin.get("/events", params={"after": after, "limit": 200}).json()
            if not page["items"]:
                break
            yield f"events {after}", json.dumps(page).encode()
            after = page["next"]
        for path in paths:
            yield path, self.admin.get(path).content
        yield "/ws", "\n".join(frames.heard).encode()
        for number, answer in enumerate(self.answers):
            yield f"answer {number}", answer
        self.server.stop()
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name != "master.key":
                yield str(file.relative_to(folder)), file.read_bytes()
        database = open_database(database_url)

        def rows() -> Iterator[bytes]:
            for table in database.engine.get_tables():
                for row in database.engine.execute_sql(f'SELECT * FROM "{table}"').fetchall():
                    yield repr(row).encode()

        try:
            yield "rows", database.run(lambda: b"\n".join(rows()), read=True)
        finally:
            database.close()


def test_s07_no_secret_is_found_anywhere(database_url: str, tmp_path: Path, long_form: bool, figure: Any) -> None:
    count = 500 if long_form else 10
    environ = {"CORRAL_LOG_LEVEL": "debug", "CORRAL_ACCESS_TTL": "3600"}
    with ServerProcess(tmp_path, database_url=database_url, environ=environ) as server:
        admin = server.sign_in()
        frames = Frames(server.address, admin.headers["Authorization"].removeprefix("Bearer "))
        frames.start()
        admin.put("/settings/llm/store_payloads", json={"value": "all"}).raise_for_status()
        tour = Tour(server, admin)
        made = [tour.store(n) for n in range(count)]
        time.sleep(3)  # 2 s until every process knows them
        for n in range(count):
            tour.people(n)
            tour.worker_reports(n)
            tour.chat(admin, marked(n))
        admin.post("/auth/reauth", json={"password": PASSWORD}).raise_for_status()
        shown = admin.post(f"/secrets/{made[0]['id']}/reveal", json={"reason": "the one that may be seen"})
        assert shown.json()["value"] == marked(0)
        tour.told("POST", "/tasks", {"title": CONTROL})
        wanted = {trace: n for n in range(count) for trace in traces(marked(n))}
        places, hits, controls = 0, [], set()
        for place, data in tour.search(database_url, tmp_path, frames):
            places += 1
            controls |= {place} if CONTROL.encode() in data else set()
            hits += [(place, wanted[trace], trace) for trace in wanted if trace in data]
        alerts = [text for text in frames.heard if "secret_detected" in text]
        assert hits == []
        assert {"rows", "/ws", "/tasks?limit=200"} < controls  # the search does see
        assert alerts
        assert len(frames.heard) > count
        figure("S7", {"secrets": count, "places": places, "answers": len(tour.answers), "hits": 0})
