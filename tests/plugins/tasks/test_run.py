"""`corral run` against a real server with its embedded worker."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.kernel.cli.warm import Fork, warm

from corral.cli.api_client import ApiClient, ApiClientError
from corral.testing.server import ServerProcess
from corral_plugins.tasks.commands.following import EventPrinter

SCRIPTS = """
[plugins.llm.scripts.refuses]
turns = [{ error = { status = 400, message = "No such thing." } }]
[plugins.llm.scripts.writes]
turns = [{ text = "One two three four five six seven eight nine ten eleven twelve.", delay_seconds = 3, chunk = 4 }]
"""


class Run:
    """`run("--agent", "Echo", "Say hello")`: the command, signed in."""

    def __init__(self, folder: Path, address: str, client: httpx2.Client) -> None:
        self.folder, self.client = folder, client
        token = client.headers["Authorization"].removeprefix("Bearer ")
        self.environ = {**os.environ, "CORRAL_URL": address, "CORRAL_TOKEN": token, "XDG_CONFIG_HOME": str(folder)}
        self.beside: dict[str, Fork] = {}

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return warm().run(("run", *arguments), cwd=self.folder, environ={**self.environ, **environ}, stdin="")

    def agent(self, name: str, model: str = "echo") -> str:
        fields = {"name": name, "llm_provider": "scripted", "llm_model": model, "retry_policy": {"max_attempts": 1}}
        agent = self.client.post("/agents", json=fields).raise_for_status().json()
        self.client.post(f"/agents/{agent['id']}/start", json={}).raise_for_status()
        return str(agent["id"])


class Beside:
    """The command beside the test; `out` and `err` are what it has written so far."""

    def __init__(self, run: Run, name: str, *arguments: str, **environ: str) -> None:
        self.out, self.err = run.folder / f"{name}.out", run.folder / f"{name}.err"
        given = {**run.environ, **environ}
        self._process = run.beside[name] = warm().start(
            ("run", *arguments), cwd=run.folder, environ=given, log=self.out, errors=self.err
        )

    def lines(self, count: int) -> list[str]:
        """The first lines on standard error, once they are there."""
        until = time.monotonic() + 60
        while not self.err.exists() or (told := self.err.read_text("utf-8")).count("\n") < count:
            assert self._process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        return told.splitlines(keepends=True)[:count]

    def wait(self) -> int:
        """Its exit status."""
        return self._process.wait(60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    config = folder / "corral.toml"
    config.write_text(SCRIPTS)
    with (
        ServerProcess(folder, arguments=(), environ={"CORRAL_CONFIG": str(config)}) as server,
        server.sign_in() as client,
    ):
        made = Run(folder, server.address, client)
        yield made
        for process in made.beside.values():
            process.kill()


def task_of(run: Run, done: subprocess.CompletedProcess[str]) -> Any:
    return run.client.get(f"/tasks/{json.loads(done.stdout)['task_id']}").raise_for_status().json()


def test_the_result_is_on_standard_output_and_the_rest_beside_it(run: Run) -> None:
    run.agent("Echo One")
    done = run("--agent", "echo one", "Say hello")
    assert (done.returncode, done.stdout) == (0, "Say hello\n"), done
    for word in ("created", "assigned", "started", "completed", "tokens in", "$"):
        assert word in done.stderr


def test_as_json_with_a_file_as_data(run: Run) -> None:
    agent = run.agent("Echo Two")
    (run.folder / "data.json").write_text('{"a": [1]}')
    (run.folder / "notes.txt").write_text("just text")
    for name, told in (("data.json", {"a": [1]}), ("notes.txt", {"text": "just text"})):
        done = run("--agent", agent, "--json", "--input", name, "Read it.\nAll of it.")
        assert done.returncode == 0, done
        outcome, task = json.loads(done.stdout), task_of(run, done)
        assert (outcome["status"], outcome["calls"]) == ("completed", 1)
        assert (task["input"], task["title"], task["agent_id"]) == (told, "Read it.", agent)
        assert done.stderr == ""


def test_words_are_shown_as_they_come(run: Run) -> None:
    run.agent("Writer", "writes")
    done = run("--agent", "Writer", "Count")
    assert done.returncode == 0, done
    assert "  progress   One" in done.stderr
    assert done.stdout == "One two three four five six seven eight nine ten eleven twelve.\n"


def test_why_nobody_takes_it_is_told(run: Run) -> None:
    """The agent is started once the command has said that it is not; it says so once."""
    fields = {"name": "Sleeper", "llm_provider": "scripted", "llm_model": "echo"}
    agent = run.client.post("/agents", json=fields).raise_for_status().json()["id"]
    process = Beside(run, "sleeper", "--agent", "Sleeper", "Wake up")
    created, reason = process.lines(2)
    assert "created" in created
    run.client.post(f"/agents/{agent}/start", json={}).raise_for_status()
    status = process.wait()
    out, err = process.out.read_text("utf-8"), process.err.read_text("utf-8").removeprefix(created + reason)
    assert "  waiting    The agent is offline. Start it: corral agents start Sleeper\n" in reason
    assert (status, out) == (0, "Wake up\n"), err
    assert reason.partition("waiting")[2] not in err


def test_only_a_completed_task_is_a_success(run: Run) -> None:
    run.agent("Refuser", "refuses")
    done = run("--agent", "Refuser", "Do it")
    assert (done.returncode, done.stdout) == (1, ""), done
    assert "No such thing." in done.stderr
    assert json.loads(run("--agent", "Refuser", "--json", "Do it").stdout)["status"] == "failed"


def test_a_model_that_nobody_set_up_is_told_and_asked_for_never(run: Run) -> None:
    fields = {"name": "Keyless", "llm_model": "openai/gpt-4o-mini"}
    agent = run.client.post("/agents", json=fields).raise_for_status().json()
    assert agent["warnings"] == ["provider_not_configured"]
    run.client.post(f"/agents/{agent['id']}/start", json={}).raise_for_status()
    process = Beside(run, "keyless", "--agent", "Keyless", "Say it")
    _, reason = process.lines(2)
    assert "  waiting    The provider openai is not configured." in reason
    run.client.patch(f"/agents/{agent['id']}", json={"llm_model": "scripted/echo"}).raise_for_status()
    assert (process.wait(), process.out.read_text("utf-8")) == (0, "Say it\n")


def test_following_ends_after_a_while_and_the_task_goes_on(run: Run) -> None:
    fields = {"name": "Left alone", "llm_provider": "scripted", "llm_model": "echo"}
    run.client.post("/agents", json=fields).raise_for_status()
    done = run("--agent", "Left alone", "--timeout", "2", "Say it")
    task = done.stderr.rsplit("the task ", 1)[1].split()[0]
    assert done.stderr.splitlines()[-1] == (
        f"corral: the task {task} has not ended after 2 s; it continues: corral tasks watch {task}"
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    assert run.client.get(f"/tasks/{task}").raise_for_status().json()["status"] == "pending"


def test_an_absent_server_is_told_once() -> None:
    told: list[str] = []
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        remote = ApiClient(f"http://127.0.0.1:{taken.getsockname()[1]}", "none")
        until = time.monotonic() + 2
        with (
            contextlib.closing(remote),
            pytest.raises(ApiClientError, match="does not answer"),
            remote.waiting_out_outages(told.append, until=until),
        ):
            list(remote.events("task", "x", until=until))
    assert len(told) == 1
    assert "does not answer: connection refused" in told[0]
    assert "waiting for the server, for up to 120 s" in told[0]


def test_attempts_and_reasons_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    printer = EventPrinter(quiet=False)
    printer.print_event("task.started", {"attempt": 1})
    printer.print_event("task.retried", {"attempt": 1, "reason": "lease_lost: The worker gave no sign of life."})
    printer.print_event("task.started", {"attempt": 2})
    told = [line.split("s  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["started", "retried    lease_lost: The worker gave no sign of life.", "started    attempt 2"]


def test_lines_have_the_times_of_the_events(capsys: pytest.CaptureFixture[str]) -> None:
    printer = EventPrinter(quiet=False)
    for event, ts in (("task.assigned", "2026-01-01T10:00:00.000Z"), ("task.completed", "2026-01-01T10:01:05.500Z")):
        printer.set_time(ts)
        printer.print_event(event, {})
    times = [float(line.split()[0]) for line in capsys.readouterr().err.splitlines()]
    assert times == pytest.approx([0, 65.5], abs=0.2)


def test_a_task_is_followed_though_the_log_was_pruned(run: Run) -> None:
    run.agent("Echo Late")
    with contextlib.closing(sqlite3.connect(run.folder / "data" / "corral.db")) as connection, connection:
        connection.execute("DELETE FROM kernel_events WHERE seq < (SELECT MAX(seq) FROM kernel_events)")
    done = run("--agent", "Echo Late", "Say it")
    assert (done.returncode, done.stdout) == (0, "Say it\n"), done


def test_what_is_wrong_is_one_line(run: Run) -> None:
    run.agent("Echo Three")
    inputs = {
        "image": b"\x89PNG\xff",
        "twice": b'{"a": 1, "a": 2}',
        "huge": b'{"a": 1e999}',
        "half": b'{"a": "\\ud800"}',
    }
    for name, data in inputs.items():
        (run.folder / name).write_bytes(data)
    cases = [
        (("--agent", "Nobody", "Do it"), {}, 1, "there is no agent named Nobody"),
        (("--agent", "?limit=1", "Do it"), {}, 1, "there is no agent named ?limit=1"),
        (("--agent", "\udcff", "Do it"), {}, 2, "--agent is not UTF-8 text"),
        (("--agent", "Echo Three", "\udcff"), {}, 2, "INSTRUCTIONS is not UTF-8 text"),
        (("--agent", "Echo Three", "--input", "twice", "Do it"), {}, 2, "twice: The key 'a' appears more than once"),
        (("--agent", "Echo Three", "--input", "huge", "Do it"), {}, 2, "huge: "),
        (("--agent", "Echo Three", "--input", "half", "Do it"), {}, 2, "half: "),
        (("--agent", "Echo Three", "--input", "/dev/zero", "Do it"), {}, 2, "larger than 262144 bytes"),
        (("--agent", "Echo Thre", "Do it"), {}, 1, "did you mean Echo Three?"),
        (("--agent", "Echo Three", " "), {}, 2, "INSTRUCTIONS is empty"),
        (("--agent", "Echo Three", "Do it"), {"CORRAL_TOKEN": ""}, 1, "run `corral login"),
        (
            ("--agent", "Echo Three", "Do it"),
            {"CORRAL_TOKEN": "wrong"},
            1,
            "set CORRAL_TOKEN to a valid API key or access token",
        ),
        (("--agent", "Echo Three", "Do it"), {"CORRAL_TOKEN": "\u00fc"}, 2, "CORRAL_TOKEN: a token must consist"),
        (("--agent", "Echo Three", "--server", "ftp://x", "Do it"), {}, 2, "must begin with http"),
        (("--agent", "Echo Three", "--server", "http://127.0.0.1:9", "Do it"), {}, 1, "does not answer"),
        (("--agent", "Echo Three", "--server", "http://[::1", "Do it"), {}, 2, "http://[::1 is not a valid URL"),
        (("--agent", "Echo Three", "Do it"), {"CORRAL_URL": "http://"}, 2, "is not a valid URL"),
        (("--agent", "Echo Three", "Do it"), {"CORRAL_URL": "http://127.0.0.1:x"}, 2, "http://127.0.0.1:x is not"),
    ]
    for arguments, environ, status, words in cases:
        done = run(*arguments, **environ)
        assert (done.returncode, done.stdout) == (status, ""), done
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_token_that_ends_leaves_the_task_and_says_which(run: Run) -> None:
    fields = {"name": "Never started", "llm_provider": "scripted", "llm_model": "echo"}
    run.client.post("/agents", json=fields).raise_for_status()
    made = run.client.post("/security/api-keys", json={"name": "short", "scopes": ["*"]})
    key = made.raise_for_status().json()
    following = Beside(run, "following", "--agent", "Never started", "Do it", CORRAL_TOKEN=key["key"])
    (created,) = following.lines(1)
    run.client.delete(f"/security/api-keys/{key['id']}").raise_for_status()
    assert following.wait() == 1
    assert f"the task {created.split()[-1]} continues" in following.err.read_text("utf-8")


async def test_memories_are_refused_until_a_plugin_stores_them(world: Any) -> None:
    await world.task()
    lease = await world.worker.run()
    refused = await lease.call("complete", {"result": {"text": "done"}, "memories": [{"text": "a fact"}]})
    assert (refused.status, refused.json()["errors"][0]["pointer"]) == (422, "/memories")
    assert (await world.read(lease.task_id))["status"] == "running"
    await lease.ok("complete", {"result": {"text": "done"}, "memories": []})
