"""What goes through several requests: tasks through workers, events to many viewers."""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import msgspec
from tests.benchmarks.bench import HELLO, SOCKETS_A_USER, TASKS, Bench, Figure, Product, claimer
from tests.benchmarks.seeds import PATTERN
from tests.benchmarks.servers import HERE, LOAD_CORE, PASSWORD, Broken, load, request_bytes, sockets_reference

WORKERS = 8


def run_load(script: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a load script on the core of the load; its result."""
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        input=json.dumps(job).encode(),
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {LOAD_CORE}),
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def p9(bench: Bench) -> Figure:
    """Tasks from created to completed by workers that do nothing, on the server that `auto` takes, and on Hypercorn."""
    found = _completions(bench, bench.flows())
    title = f"tasks/s, created to completed by {WORKERS} workers"
    if not bench.short:
        on_hypercorn = found["hypercorn"] = _completions(bench, bench.flows("hypercorn"))
        title += f", Hypercorn {on_hypercorn['ratio']:.2f} H"
    return Figure(name="P9", title=title, value=found["ratio"], target=0.15, unit="H", details=found)


def _completions(bench: Bench, product: Product) -> dict[str, Any]:
    """`ratio` is the median of the rounds; `cpu_ratio` the same of the server's CPU time, as in `compare`."""
    workers = [msgspec.to_builtins(claimer(product, agents=1, slots=4)) for _ in range(WORKERS)]
    count, rounds = (40, 1) if bench.short else (600, 5)
    ratios, cpu_ratios, rates = [], [], []
    for _ in range(rounds):
        created = load(
            product.server, [request_bytes("POST", TASKS, PATTERN, product.token)], count=count, accept=(201,)
        )
        hello = load(bench.hello, HELLO, seconds=bench.seconds)
        used = product.server.cpu_seconds()
        found = run_load("worker_load.py", {"port": product.server.port, "workers": workers, "count": created.count})
        if found["count"] < count:
            raise Broken(f"of {count} tasks {found['count']} were done")
        cpu_ratios.append(hello.cpu_us / 1e6 * found["count"] / (product.server.cpu_seconds() - used))
        ratios.append(found["per_second"] / hello.per_second)
        rates.append(found["per_second"])
    return {
        "ratio": statistics.median(ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "per_second": rates,
        "ratios": ratios,
    }


def p11(bench: Bench) -> Figure:
    """Compare deliveries to many sockets with those of a stock handler a socket.

    A single burst lasts less than half a second, so the figure is the median of several.
    """
    clients, burst, bursts = (100, 5, 1) if bench.short else (1000, 20, 9)
    product = bench.flows()
    paths = [f"/ws?token={token}" for token in _members(product, -(-clients // SOCKETS_A_USER))]
    job = {
        "port": product.server.port,
        "paths": [path for path in paths for _ in range(SOCKETS_A_USER)][:clients],
        "emit": _encoded(request_bytes("POST", TASKS, PATTERN, product.token)),
        "events": 1,
        "burst": burst,
        "bursts": bursts,
        "single": 10,
        "say": '{"type":"subscribe","event":"task.created"}',
    }
    mine = run_load("socket_load.py", job)
    with sockets_reference() as reference:
        job |= {
            "port": reference.port,
            "paths": ["/ws"] * clients,
            "say": None,
            "emit": _encoded(request_bytes("POST", "/emit?count=1")),
        }
        theirs = run_load("socket_load.py", job)
    return Figure(
        name="P11",
        title=f"/ws: frames/s to {clients} clients, to a handler a client",
        value=mine["per_second"] / theirs["per_second"],
        target=1.5,
        unit="x",
        details={
            "per_second": mine["rates"],
            "other_per_second": theirs["rates"],
            "last_client_ms": mine["last_ms"],
            "other_last_client_ms": theirs["last_ms"],
        },
    )


def _members(product: Product, count: int) -> list[str]:
    """Tokens of new members."""
    tokens = []
    for number in range(count):
        who = {"email": f"member{number}@example.org", "password": PASSWORD, "full_name": f"Member {number}"}
        product.server.must("POST", "/api/v1/auth/register", who)
        answer = product.server.must("POST", "/api/v1/auth/login", {"email": who["email"], "password": PASSWORD})
        tokens.append(answer["access_token"])
    return tokens


def _encoded(request: bytes) -> str:
    return base64.b64encode(request).decode()
