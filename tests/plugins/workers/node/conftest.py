"""A real server and real workers, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from corral.testing import server

EMAIL, PASSWORD = "root@example.org", "correct horse battery staple"
READY_SECONDS, TASK_SECONDS = 120, 120


class Process:
    """A process with its output; killed with its group at the end."""

    def __init__(self, arguments: list[str], env: dict[str, str], folder: Path) -> None:
        descriptor, name = tempfile.mkstemp(prefix="output-", dir=folder)
        os.close(descriptor)
        self._log = Path(name)
        usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        try:
            self.popen = server.start_process(arguments, environ=env, folder=folder, log=self._log)
        finally:
            signal.signal(signal.SIGHUP, usual)

    @property
    def output(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def wait_for(self, pattern: str, seconds: float = READY_SECONDS) -> re.Match[str]:
        """Wait until the output matches the pattern."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := re.search(pattern, self.output):
                return found
            if self.popen.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the output (status {self.popen.poll()}):\n{self.output}")

    def tree(self) -> list[psutil.Process]:
        """The descendants of the process."""
        try:
            return list(psutil.Process(self.popen.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def stop(self, seconds: float = 60) -> int:
        """Send TERM, wait, and return the exit status."""
        self.signal(signal.SIGTERM)
        status: int = self.popen.wait(seconds)
        return status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(60)


class Site:
    """A running installation with a signed-in admin."""

    def __init__(
        self, folder: Path, scripts: dict[str, Any], *serve: str, settings: str = "", config: str = ""
    ) -> None:
        self.folder = folder
        file = folder / "corral.toml"
        names = "\n".join(f"{name} = {json.dumps(str(self._script(name, turns)))}" for name, turns in scripts.items())
        file.write_text(f"[plugins.llm.scripts]\n{names}\n\n{config}\n\n[settings]\n{settings}\n")
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("CORRAL_")},
            "CORRAL_DATA_DIR": str(folder / "data"),
            "CORRAL_CONFIG": str(file),
            "CORRAL_RATE_LIMITS": "off",
            "CORRAL_BOOTSTRAP_ADMIN_EMAIL": EMAIL,
            "CORRAL_BOOTSTRAP_ADMIN_PASSWORD": PASSWORD,
            "CORRAL_LOG_FORMAT": "console",
            "XDG_STATE_HOME": str(folder / "state"),
        }
        self._started: list[Process] = []
        self.server = self.start("serve", "--bind", "127.0.0.1:0", "--config", str(file), *serve)
        self.url = self.server.wait_for(r"ready on \w+: (http://\S+?)/api/v1").group(1)
        self.http = httpx2.Client(base_url=f"{self.url}/api/v1", timeout=60, trust_env=False)
        signed = self.call("POST", "/auth/login", {"email": EMAIL, "password": PASSWORD})
        self.http.headers["Authorization"] = f"Bearer {signed['access_token']}"

    def _script(self, name: str, turns: list[Any]) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"turns": turns}))
        return path

    def start(self, *arguments: str, **env: str) -> Process:
        process = Process(list(arguments), {**self.env, **env}, self.folder)
        self._started.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self._started):
            process.kill()

    def clear(self) -> None:
        """Leave the server alone: end all other processes, and delete workers, and agents with their tasks."""
        while len(self._started) > 1:
            self._started.pop().kill()
        shutil.rmtree(self.folder / "state", ignore_errors=True)
        for agent in self.call("GET", "/agents?limit=200")["items"]:
            self.call("POST", f"/agents/{agent['id']}/stop", {"mode": "immediate", "cancel_tasks": True})
            self.call("DELETE", f"/agents/{agent['id']}")
        for worker in self.call("GET", "/admin/workers?limit=200")["items"]:
            self.call("DELETE", f"/admin/workers/{worker['id']}?force=true")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.http.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}\n{self.server.output}"
        return answer.json() if answer.content else None

    def key(self, *, auto_approve: bool = True) -> str:
        found: str = self.call("POST", "/admin/registration-keys", {"name": "k", "auto_approve": auto_approve})["key"]
        return found

    def worker(self, name: str = "w1", *options: str, key: str | None = None) -> Process:
        """Start a worker and wait until it is registered."""
        arguments = ("worker", "--url", self.url, "--name", name, *options)
        process = self.start(*arguments, CORRAL_WORKER_TOKEN=key or self.key())
        process.wait_for(rf"worker {name} \(")
        return process

    def agent(self, model: str, **fields: Any) -> str:
        body = {"name": f"agent {model}", "llm_provider": "scripted", "llm_model": model, **fields}
        found: str = self.call("POST", "/agents", body)["id"]
        self.call("POST", f"/agents/{found}/start", {})
        return found

    def task(self, agent_id: str, **fields: Any) -> str:
        body = {"title": "a task", "instructions": "Say hello.", "agent_id": agent_id, **fields}
        found: str = self.call("POST", "/tasks", body)["id"]
        return found

    def ended(self, task_id: str, seconds: float = TASK_SECONDS) -> dict[str, Any]:
        """Wait for the end of a task and return it."""
        return self.until(task_id, "completed", "failed", "cancelled", seconds=seconds)

    def until(self, task_id: str, *states: str, seconds: float = TASK_SECONDS) -> dict[str, Any]:
        """Wait until a task is in one of these states and return it."""
        stop = time.monotonic() + seconds
        while True:
            task: dict[str, Any] = self.call("GET", f"/tasks/{task_id}")
            if task["status"] in states:
                return task
            if time.monotonic() > stop:
                told = "\n".join(process.output for process in self._started)
                raise AssertionError(f"the task is {task['status']} after {seconds} s: {task}\n{told}")
            time.sleep(0.05)

    def calls(self, task_id: str) -> list[dict[str, Any]]:
        """The model calls of a task, oldest first."""
        items: list[dict[str, Any]] = self.call("GET", f"/llm/calls?task_id={task_id}&limit=200")["items"]
        return items[::-1]


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """`make_site(scripts, *options of serve)`; its processes end with the test."""
    sites: list[Site] = []

    def make(scripts: dict[str, Any] | None = None, *serve: str, settings: str = "", config: str = "") -> Site:
        options = serve or ("--no-embedded-worker",)
        sites.append(Site(tmp_path, scripts or {}, *options, settings=settings, config=config))
        return sites[-1]

    yield make
    for site in sites:
        site.stop()


@pytest.fixture(scope="module")
def shared_site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One server for tests of a module that neither configure nor stop it, with the scripts of the module."""
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder, request.module.scripts(folder), "--no-embedded-worker")
    yield site
    site.stop()


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """The server of the module, for one test: the workers and agents that it makes end with it."""
    yield shared_site
    shared_site.clear()


@pytest.fixture
def gone() -> Callable[..., bool]:
    """Whether all of these processes end within `seconds`."""

    def all_gone(processes: list[psutil.Process], seconds: float = 30) -> bool:
        _, alive = psutil.wait_procs(processes, timeout=seconds)
        return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    return all_gone


@pytest.fixture
def run_corral(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`run_corral(*arguments, **environment)`: a `corral` process that ends with the test."""
    started: list[Process] = []

    def run(*arguments: str, **env: str) -> Process:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("CORRAL_")}
        folders = {"CORRAL_DATA_DIR": str(tmp_path / "data"), "XDG_STATE_HOME": str(tmp_path / "state")}
        started.append(Process(list(arguments), {**clean, **folders, **env}, tmp_path))
        return started[-1]

    yield run
    for process in started:
        process.kill()
