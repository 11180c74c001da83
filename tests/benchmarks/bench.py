"""What the benchmarks share: the standing servers of a run, and the comparison of two servers in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tests.benchmarks import servers
from tests.benchmarks.seeds import Seeds, task_ids
from tests.benchmarks.servers import Load, Server, load, request_bytes, sign_in

HELLO = [request_bytes("GET", "/hello")]
TASKS = "/api/v1/tasks"
SOCKETS_A_USER = 100
TINY = 1_000
MOST_OPEN = 1_000_000  # tasks that a person may have: creating them is measured for longer than the default allows


class Figure(msgspec.Struct, kw_only=True):
    """What was measured. The target is met by `value >= target`, or with `at_most` by `value <= target`."""

    name: str
    title: str
    value: float
    target: float
    unit: str = ""
    at_most: bool = False
    details: dict[str, Any] = {}

    def is_met(self, slack: float = 1.0) -> bool:
        """Whether the target is met; with `slack` 10 only a break of an order of magnitude counts."""
        return self.value <= self.target * slack if self.at_most else self.value * slack >= self.target


class Product(msgspec.Struct, kw_only=True):
    """A Corral that serves, with the token of its admin and the ids of tasks in it."""

    server: Server
    token: str
    ids: list[str]

    def get(self, path: str) -> bytes:
        """A GET as bytes."""
        return request_bytes("GET", path, None, self.token)

    def gets(self) -> list[bytes]:
        """GET by id of tasks all over the table."""
        return [self.get(f"{TASKS}/{task_id}") for task_id in self.ids]


class Bench:
    """One run. Servers that are asked for stay until its end, so that what is compared runs side by side.

    In the short form, they are forks of one process, which halves the processor time of the run.
    """

    def __init__(self, folder: Path, *, short: bool) -> None:
        self.short = short
        self.folder = folder
        self.seeds = Seeds(folder, forks=short)
        self.rounds, self.seconds = (1, 0.15) if short else (7, 1.2)
        self._stack = contextlib.ExitStack()
        self._hello: Server | None = None
        self._products: dict[str, Product] = {}
        self._measured: dict[str, Any] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def hello(self) -> Server:
        """The reference server."""
        if self._hello is None:
            self._hello = self._stack.enter_context(servers.hello())
        return self._hello

    @property
    def main(self) -> Product:
        """The product with 10,000 tasks on Hypercorn, for what is measured against H."""
        return self._on("hypercorn")

    @property
    def on_uvicorn(self) -> Product:
        """The same as `main`, served by uvicorn; in the short form the one with few tasks, which is there anyway."""
        return self.product("tiny", TINY) if self.short else self._on("uvicorn")

    def _on(self, server: str) -> Product:
        if server not in self._products:
            folder = self.seeds.make(10_000)
            (folder / "corral.toml").write_text(f'[settings]\n"tasks.max_open_per_user" = {MOST_OPEN}\n')
            self._products[server] = self.start(folder, "--server", server)
        return self._products[server]

    def flows(self, server: str = "auto") -> Product:
        """The product without tasks, for what goes through several requests; a person may have many sockets."""
        if (name := f"flows on {server}") not in self._products:
            folder = self.seeds.make(0)
            (folder / "corral.toml").write_text(f'[settings]\n"realtime.max_sockets_per_user" = {SOCKETS_A_USER}\n')
            self._products[name] = self.start(folder, "--server", server)
        return self._products[name]

    def product(self, name: str, size: int) -> Product:
        """The product with this many tasks."""
        if name not in self._products:
            self._products[name] = self.start(self.seeds.make(size))
        return self._products[name]

    def product_in(self, name: str, make: Callable[[Bench], Path]) -> Product:
        """The product in a folder that is made for it, started once."""
        if name not in self._products:
            self._products[name] = self.start(make(self))
        return self._products[name]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is measured once in a run, and shown beside several figures."""
        if name not in self._measured:
            self._measured[name] = measure()
        return self._measured[name]

    def start(self, folder: Path, *options: str) -> Product:
        """Serve a folder until the end of the run, and use it a little: the first reads decide how reads are run."""
        server = self._stack.enter_context(servers.corral(folder, *options, forks=self.short))
        token = sign_in(server)
        product = Product(server=server, token=token, ids=task_ids(folder))
        load(server, product.gets(), seconds=0.3)
        return product

    def against_hello(
        self, product: Product, requests: Sequence[bytes], *, accept: Sequence[int] = (200,)
    ) -> dict[str, Any]:
        """See `compare`, with H as the other."""
        return compare(
            (product.server, requests, accept), (self.hello, HELLO, (200,)), rounds=self.rounds, seconds=self.seconds
        )


class Claimer(msgspec.Struct, kw_only=True):
    """An approved worker."""

    id: str
    token: str


def claimer(product: Product, *, agents: int, slots: int) -> Claimer:
    """A worker that has just been registered, and started agents for as much as it may take."""
    server, token = product.server, product.token
    name = f"bench-{time.monotonic_ns()}"
    for number in range(agents):
        facts = {"name": f"{name}-{number}", "max_concurrent_tasks": min(100, slots)}
        agent = server.must("POST", "/api/v1/agents", facts, token)
        server.must("POST", f"/api/v1/agents/{agent['id']}/start", {}, token)
    worker = server.must("POST", "/api/v1/workers/register", {"name": name, "max_agents": slots}, token)
    server.must("PATCH", f"/api/v1/admin/workers/{worker['id']}/approve", {"is_approved": True}, token)
    return Claimer(id=worker["id"], token=worker["token"])


Side = tuple[Server, Sequence[bytes], Sequence[int]]


def compare(
    one: Side, other: Side, *, rounds: int, seconds: float | None = None, count: int | None = None
) -> dict[str, Any]:
    """Load both in turns, after a short load of each. `ratio` is the median of the rounds' ratios; `cpu_ratio` the same
    of the server's CPU time a request, which other processes on the machine disturb less.
    """
    for server, requests, accept in (other, one):
        load(server, requests, accept=accept, **({"seconds": min(0.3, seconds / 2)} if seconds else {"count": 1}))
    pairs: list[tuple[Load, Load]] = []
    for _ in range(rounds):
        first, second = (load(s, r, accept=a, seconds=seconds, count=count) for s, r, a in (one, other))
        pairs.append((first, second))
    middle = statistics.median
    return {
        "ratio": middle([mine.per_second / theirs.per_second for mine, theirs in pairs]),
        "cpu_ratio": middle([theirs.cpu_us / mine.cpu_us for mine, theirs in pairs]),
        "per_second": middle([mine.per_second for mine, _ in pairs]),
        "other_per_second": middle([theirs.per_second for _, theirs in pairs]),
        "p50_ms": middle([mine.p50_ms for mine, _ in pairs]),
        "p99_ms": middle([mine.p99_ms for mine, _ in pairs]),
        "tail": middle([mine.p99_ms / mine.p50_ms for mine, _ in pairs]),
    }
