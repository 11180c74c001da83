"""`corral serve` in several processes on one address: one installation, replaced without a gap, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from tests.end_to_end.waiting_claims import check_new_tasks_reach_waiting_claims
from tests.kernel.cli import warm
from tests.limits import Stopwatch

from corral.cli import processes
from corral.cli.listener import listen
from corral.cli.processes import ProcessGroup
from corral.testing.server import ServerProcess

WITHOUT_WORKER = "--no-embedded-worker"


def children(server: ServerProcess) -> set[int]:
    """The processes that serve beside or below the one that was started."""
    assert server.process is not None
    found = set()
    for child in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if {"--inherit", warm.__file__} & {*child.cmdline()}:  # started, or forked by the tests
                found.add(child.pid)
    return found


def established(pid: int) -> int:
    """How many clients are connected to a process."""
    return sum(item.status == psutil.CONN_ESTABLISHED for item in psutil.Process(pid).net_connections("tcp"))


def until(condition: Callable[[], Any], seconds: float = 60.0) -> float:
    with Stopwatch() as watch:
        while not condition():
            assert watch.seconds < seconds
            time.sleep(0.05)
    return watch.seconds


def may_listen(port: int) -> bool:
    """Whether nobody listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Load:
    """`rate` requests a second from `threads` clients, one in four a write; `with` it runs."""

    def __init__(self, server: ServerProcess, token: str, *, rate: float, threads: int = 8) -> None:
        self.server, self.token, self.pause = server, token, threads / rate
        self.answers: Counter[int] = Counter()
        self.faults: list[str] = []
        self.slowest = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def _run(self, number: int) -> None:
        with self.server.client(self.token) as client:
            due = time.monotonic() + self.pause * number / len(self._threads)
            count = 0
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                due = max(due + self.pause, time.monotonic() - 1)
                count += 1
                began = time.monotonic()
                try:
                    if count % 4:
                        answer = client.get("/tasks", params={"limit": 5})
                    else:
                        answer = client.post("/tasks", json={"title": f"{number}-{count}"})
                except httpx2.HTTPError as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                    continue
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.answers[answer.status_code] += 1
                if answer.status_code >= 400:
                    self.faults.append(answer.text[:300])

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def token_of(client: httpx2.Client) -> str:
    return client.headers["Authorization"].removeprefix("Bearer ")


def test_operations_4_four_processes_on_sqlite(tmp_path: Path, long_form: bool) -> None:
    """No lock error under load; an event and a signed-out session are known to all processes within 2 s."""
    server = ServerProcess(tmp_path, arguments=("--processes", "4", WITHOUT_WORKER))
    with server:
        until(lambda: "Corral is ready on" in server.log)
        assert len(children(server)) == 4
        admin, other = server.sign_in(), server.sign_in()
        with (
            Load(server, token_of(admin), rate=200) as load,
            ThreadPoolExecutor(24) as pool,
            Stopwatch() as watch,
        ):
            time.sleep(20 if long_form else 3)
            serving = [pid for pid in children(server) if established(pid)]
            assert len(serving) > 1, "one process has all connections"
            place = admin.get("/events", params={"after": 0, "types": "task.created", "limit": 1}).json()["items"][0]
            after = {"types": "agent.created", "after": place["seq"], "wait": 20}

            def hear() -> float:
                with server.client(token_of(admin)) as fresh:
                    assert fresh.get("/events", params=after).json()["items"]
                return watch.seconds

            heard = [pool.submit(hear) for _ in range(12)]
            time.sleep(1)
            admin.post("/agents", json={"name": "listen"}).raise_for_status()
            told = watch.seconds
            assert max(future.result() for future in heard) - told < 2.0

            def served() -> int:
                with server.client(token_of(other)) as fresh:
                    return fresh.get("/auth/me").status_code

            assert {*pool.map(lambda _: served(), range(20))} == {200}
            other.post("/auth/logout").raise_for_status()
            ended = watch.seconds
            until(lambda: watch.seconds >= ended + 2.0)
            assert {*pool.map(lambda _: served(), range(40))} == {401}
            until(lambda: load.answers[201] > 100)
        assert load.faults == []
        assert set(load.answers) <= {200, 201}
        assert server.stop() == 0
    assert not re.search("database is (locked|busy)", server.log)


TWO = "[server]\nprocesses = 2\n"


@contextlib.contextmanager
def two_processes(folder: Path) -> Iterator[ServerProcess]:
    config = folder / "corral.toml"
    config.write_text(TWO)
    server = ServerProcess(folder, arguments=(WITHOUT_WORKER,), environ={"CORRAL_CONFIG": str(config)})
    with server:
        until(lambda: "Corral is ready on" in server.log)  # all are; one answers earlier
        yield server


@pytest.fixture
def two(tmp_path: Path) -> Iterator[ServerProcess]:
    with two_processes(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """For tests after which the same two processes serve as before."""
    with two_processes(tmp_path_factory.mktemp("shared")) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def same_two(shared: ServerProcess) -> Iterator[ServerProcess]:
    """`shared`, and the test has left it as it was."""
    before = children(shared)
    assert len(before) == 2
    yield shared
    assert children(shared) == before


def test_sighup_replaces_all_processes_and_cuts_no_request(two: ServerProcess) -> None:
    assert two.process is not None
    old = children(two)
    (two.folder / "corral.toml").write_text("[server]\nprocesses = 3\n")
    with two.sign_in() as admin, Load(two, token_of(admin), rate=60, threads=4) as load:
        time.sleep(1)
        two.process.send_signal(signal.SIGHUP)
        until(lambda: '"reloaded"' in two.log)
        until(lambda: not old & children(two))
        time.sleep(1)
        until(lambda: load.answers[201] > 20)
    assert len(children(two)) == 3
    assert load.faults == []
    assert two.stop() == 0


def test_sighup_of_a_single_process_makes_it_the_parent_of_others(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, arguments=(WITHOUT_WORKER,))
    with server:
        assert server.process is not None
        assert children(server) == set()
        with server.sign_in() as admin, Load(server, token_of(admin), rate=60, threads=4) as load:
            time.sleep(1)
            server.process.send_signal(signal.SIGHUP)
            until(lambda: '"stopped"' in server.log)
            time.sleep(1)
        assert load.faults == []
        first = children(server)
        assert len(first) == 1
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log.count('"stopped"') == 2)
        until(lambda: len(children(server)) == 1)
        assert children(server) != first
        with server.client() as client:
            assert client.get(f"{server.address}/health/ready").status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[server]\nprocesses = 2\nbinds = 'x'\n", "unknown key server.binds"),
        (
            "[server]\nprocesses = 2\n[plugins]\nstrict = true\n[plugins.workers]\nembeded = true\n",
            "unknown field `embeded`",
        ),
    ],
)
def test_if_the_new_processes_fail_the_old_ones_stay(same_two: ServerProcess, text: str, reason: str) -> None:
    assert same_two.process is not None
    old, known = children(same_two), len(same_two.log)
    config = same_two.folder / "corral.toml"
    config.write_text(text)
    same_two.process.send_signal(signal.SIGHUP)
    until(lambda: "reload failed" in same_two.log[known:])
    config.write_text(TWO)
    line = next(line for line in same_two.log[known:].splitlines() if "reload failed" in line)
    assert reason in line
    until(lambda: children(same_two) == old)
    with same_two.sign_in() as admin:
        assert admin.get("/tasks").status_code == 200


def test_a_process_that_dies_is_started_again(two: ServerProcess) -> None:
    old = children(two)
    victim = min(old)
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(children(two) - {victim}) == 2)
    assert victim not in children(two)
    assert "restarting it" in two.log
    with two.sign_in() as admin:
        assert admin.get("/tasks").status_code == 200


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of other processes are Linux's")
def test_a_process_that_cannot_be_started_again_at_once_is_later(two: ServerProcess) -> None:
    """There are no descriptors left, or no memory."""
    assert two.process is not None
    victim = min(children(two))
    soft, hard = resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE, (6, hard))
    os.kill(victim, signal.SIGKILL)
    until(lambda: "could not be started; retrying" in two.log)
    resource.prlimit(two.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: len(children(two) - {victim}) == 2)


def test_processes_end_with_their_parent(two: ServerProcess) -> None:
    assert two.process is not None
    old = [psutil.Process(pid) for pid in children(two)]
    os.kill(two.process.pid, signal.SIGKILL)
    two.process.wait()
    until(lambda: not any(process.is_running() and process.status() != "zombie" for process in old), 5)
    until(lambda: may_listen(two.port), 5)  # a process is a zombie a moment before its last thread closes the socket
    two.start()
    until(lambda: len(children(two)) == 2)


@pytest.mark.parametrize("end", ["stop", "stop_after_replacement"])
async def test_a_process_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(processes, "END_SECONDS", 2.0)
    monkeypatch.setattr(processes, "DRAIN_SECONDS", 0.5)
    for name, value in ServerProcess(tmp_path).environ.items():
        monkeypatch.setenv(name, value)
    with listen("127.0.0.1:0") as listener:
        group = ProcessGroup(["serve", WITHOUT_WORKER], listener, 1)
        await group.start()
        hung = next(child for child in psutil.Process().children() if "--inherit" in child.cmdline())
        hung.suspend()
        await getattr(group, end)()
        assert not hung.is_running()


def test_what_no_process_can_start_with_ends_the_start(tmp_path: Path) -> None:
    config = tmp_path / "corral.toml"
    config.write_text("[server]\nprocesses = 2\n[plugins]\nstrict = true\n[plugins.workers]\nembeded = true\n")
    server = ServerProcess(tmp_path, arguments=(WITHOUT_WORKER,), environ={"CORRAL_CONFIG": str(config)})
    with pytest.raises(RuntimeError, match=r"exited with status 3(?s:.*)embeded"):
        server.start()
    assert server.log.count("corral: workers:") == 1


def test_one_worker_is_embedded_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """Its process passes to another one when the one that had it is killed."""
    server = ServerProcess(tmp_path, arguments=("--processes", "2"))

    def workers() -> dict[int, int]:
        """Workers, and the server process of each."""
        found = {}
        for pid in children(server):
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(pid).children():
                    if "worker" in child.cmdline():
                        found[child.pid] = pid
        return found

    with server:
        until(lambda: len(workers()) == 1)
        (first, holder), *_ = workers().items()
        os.kill(holder, signal.SIGKILL)
        until(lambda: workers() and first not in workers())
        for _ in range(20):
            time.sleep(0.1)
            assert len(workers()) <= 1
        until(lambda: len(workers()) == 1)
        assert server.stop() == 0


def test_workers_7_a_new_task_reaches_a_claim_at_another_process(same_two: ServerProcess) -> None:
    with same_two.sign_in() as admin:
        check_new_tasks_reach_waiting_claims(same_two, same_two, admin, name="shared")


def test_metrics_are_the_sum_over_the_processes(same_two: ServerProcess) -> None:
    def served(text: str) -> float:
        pattern = r'^corral_http_requests_total\{method="GET",route="/agents",status="2xx"\} (.*)$'
        return sum(float(number) for number in re.findall(pattern, text, re.MULTILINE))

    with same_two.sign_in() as admin:
        for _ in range(30):
            with same_two.client(token_of(admin)) as fresh:
                assert fresh.get("/agents").status_code == 200  # no other test asks for these
    texts = []
    for _ in range(10):
        with same_two.client() as fresh:
            texts.append(fresh.get(f"{same_two.address}/metrics").text)
    assert {served(text) for text in texts} == {30.0}
    assert len({re.findall(r"^process_start_time_seconds (.*)$", text, re.MULTILINE)[0] for text in texts}) == 1
    whole: list[str] = []  # what the database takes too long to count is left out the first time

    def counted() -> bool:
        with same_two.client() as fresh:
            whole.append(fresh.get(f"{same_two.address}/metrics").text)
        return "# TYPE corral_users " in whole[-1]

    until(counted)
    for name in ("corral_users", "corral_http_requests_total", "corral_build_info"):
        assert whole[-1].count(f"# TYPE {name} ") == 1


def test_metrics_wait_for_a_process_that_is_busy(same_two: ServerProcess) -> None:
    """A counter that falls is taken for a restart, and its rate for the whole."""

    def served() -> float:
        with same_two.client() as fresh:
            return sum(map(float, re.findall(r"^corral_http_requests_total\{.*\} (.*)$", scraped(fresh), re.MULTILINE)))

    def scraped(client: httpx2.Client) -> str:
        return client.get(f"{same_two.address}/metrics").text

    for _ in range(30):
        with same_two.client() as fresh:
            fresh.get("/tasks")  # refused, and counted
    known = served()
    for busy in children(same_two):
        os.kill(busy, signal.SIGSTOP)
        resume = threading.Timer(0.3, os.kill, (busy, signal.SIGCONT))
        resume.start()
        assert served() >= known
        resume.join()


def test_what_is_read_from_the_database_is_told_once(same_two: ServerProcess) -> None:
    with same_two.sign_in() as admin:
        event = {"usage_key": "one", "provider": "acme", "cost_usd": 0.25, "input_tokens": 1}
        admin.post("/cost/events", json=event).raise_for_status()
        told: set[str] = set()

        def scraped() -> bool:
            with same_two.client() as fresh:
                told.update(re.findall(r"^corral_cost_usd\{.*\} (.*)$", fresh.get("/metrics").text, re.MULTILINE))
            return bool(told)

        until(scraped)
        time.sleep(1.2)  # a reading is kept for a second
        scraped()
        assert told == {"0.25"}


async def test_a_stop_knows_a_process_that_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop during a start would leave a process behind, whose start then counts as crashed."""
    may_spawn, child = asyncio.Event(), object()

    async def spawn(*_: object) -> object:
        await may_spawn.wait()
        return child

    monkeypatch.setattr("corral.cli.processes.ChildProcess.spawn", spawn)
    with socket.socket() as listener:
        group = ProcessGroup(["serve"], listener, 2)
        starting = asyncio.create_task(group.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.sleep(0)
        may_spawn.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert group._children == {child}
