"""The rows of the table, one function each: `Bench` to `Figure`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from tests.benchmarks import servers
from tests.benchmarks.bench import HELLO, TASKS, TINY, Bench, Figure, Product, Side, claimer, compare
from tests.benchmarks.flow_measures import p9, p11
from tests.benchmarks.gateway_measures import p10
from tests.benchmarks.noop_plugins import write_alone, write_many
from tests.benchmarks.rival_measures import p6, p7
from tests.benchmarks.seeds import PATTERN
from tests.benchmarks.servers import load, request_bytes
from tests.benchmarks.workflow_measures import w1, w2, w3

LARGE, SMALL = 1_000_000, 10_000
CLAIMS_A_ROUND = 60


def p1(bench: Bench) -> Figure:
    """Authenticated GET of a task."""
    found = bench.against_hello(bench.main, bench.main.gets())
    return Figure(
        name="P1", title="GET /tasks/{id}, Hypercorn", value=found["ratio"], target=1.3, unit="H", details=found
    )


def p2(bench: Bench) -> Figure:
    """P1 on uvicorn."""
    product = bench.on_uvicorn
    found = bench.against_hello(product, product.gets())
    return Figure(
        name="P2", title="GET /tasks/{id}, uvicorn", value=found["ratio"], target=5.0, unit="H", details=found
    )


def p3(bench: Bench) -> Figure:
    """Creating a task, committed with its event."""
    found = bench.against_hello(bench.main, [request_bytes("POST", TASKS, PATTERN, bench.main.token)], accept=(201,))
    return Figure(name="P3", title="POST /tasks, Hypercorn", value=found["ratio"], target=0.85, unit="H", details=found)


def p3_floor(bench: Bench) -> Figure:
    """What P3 would be if the product cost nothing but its statements: how much of the target is left for the rest."""
    database = bench.seeds.make(10_000) / "data" / "corral.db"
    with servers.write_reference(database) as server:
        post = [request_bytes("POST", TASKS, PATTERN)]
        sides: list[Side] = [(server, post, (201,)), (bench.hello, HELLO, (200,))]
        found = compare(sides[0], sides[1], rounds=bench.rounds, seconds=bench.seconds)
    return Figure(
        name="P3F", title="the statements of P3 alone", value=found["ratio"], target=1.0, unit="H", details=found
    )


def p4(bench: Bench) -> Figure:
    """A page of 50 tasks."""
    found = bench.against_hello(bench.main, [bench.main.get(f"{TASKS}?limit=50")])
    return Figure(
        name="P4", title="GET /tasks?limit=50, Hypercorn", value=found["ratio"], target=0.7, unit="H", details=found
    )


def p3_uvicorn(bench: Bench) -> Figure:
    """P3 on uvicorn."""
    product = bench.on_uvicorn
    found = bench.against_hello(product, [request_bytes("POST", TASKS, PATTERN, product.token)], accept=(201,))
    return Figure(name="P3U", title="POST /tasks, uvicorn", value=found["ratio"], target=1.6, unit="H", details=found)


def p4_uvicorn(bench: Bench) -> Figure:
    """P4 on uvicorn."""
    product = bench.on_uvicorn
    found = bench.against_hello(product, [product.get(f"{TASKS}?limit=50")])
    return Figure(
        name="P4U", title="GET /tasks?limit=50, uvicorn", value=found["ratio"], target=1.5, unit="H", details=found
    )


def p5(bench: Bench) -> Figure:
    """The tail of P1."""
    seconds, rounds = (0.3, 2) if bench.short else (2.0, 7)
    loads = [load(bench.main.server, bench.main.gets(), seconds=seconds) for _ in range(rounds)]
    tails = [each.p99_ms / each.p50_ms for each in loads]
    details = {"p50_ms": [each.p50_ms for each in loads], "p99_ms": [each.p99_ms for each in loads]}
    value = statistics.median(tails)
    return Figure(
        name="P5", title="p99 of P1 to its p50", value=value, target=4.0, unit="x", at_most=True, details=details
    )


def p8(bench: Bench) -> Figure:
    """Claims in a large table to those in a small one."""
    few, many = bench.product("tiny", TINY), _large(bench)
    found = _claims(bench, many, few)
    return Figure(
        name="P8", title="claims/s, 1e6 rows to 1e3", value=found["ratio"], target=0.8, unit="x", details=found
    )


def p12(bench: Bench) -> Figure:
    """The price of plugins that do nothing."""
    alone, many = bench.seeds.make(TINY), bench.seeds.make(TINY)
    write_alone(alone)
    write_many(many, 40)
    one, other = bench.start(many), bench.start(alone)
    active = one.server.must("GET", "/api/v1/plugins?limit=100", None, one.token)["items"]
    count = sum(item["state"] == "active" for item in active)
    if count < 40:
        raise servers.Broken(f"only {count} plugins are active: {active}")
    found = compare(
        (one.server, one.gets(), (200,)),
        (other.server, other.gets(), (200,)),
        rounds=bench.rounds,
        seconds=bench.seconds,
    )
    found["active"] = count
    for each in (one, other):  # nothing else is measured on them
        each.server.stop()
    return Figure(
        name="P12",
        title="P1 with 40 more plugins to tasks alone",
        value=found["ratio"],
        target=0.9,
        unit="x",
        details=found,
    )


def p13(bench: Bench) -> Figure:
    """Process start to the first 2xx, everything as it comes, caches warm.

    The short form, which runs beside other tests, leaves out the wait for a core. The main thread does the start.
    """
    folder = bench.seeds.make(0)
    took = []
    for _ in range(1 if bench.short else 8):
        server = servers.start_corral(folder)
        try:
            ready = server.wait_for("/health/ready")
            took.append(max(0.0, ready - server.waited_seconds()) if bench.short else ready)
        finally:
            server.stop()
    return Figure(
        name="P13",
        title="start to first 2xx",
        value=statistics.median(took[1:] or took),
        target=1.5,
        unit="s",
        at_most=True,
        details={"seconds": took},
    )


def p14(bench: Bench) -> Figure:
    """Memory of the process that P1, P3 and P4 ran in (or a short form of them, when they did not)."""
    product = bench.main
    before = product.server.rss_mb()
    for requests, accept in (
        (product.gets(), (200,)),
        ([product.get(f"{TASKS}?limit=50")], (200,)),
        ([request_bytes("POST", TASKS, PATTERN, product.token)], (201,)),
    ):
        load(product.server, requests, seconds=0.2 if bench.short else 2.0, accept=accept)
    return Figure(
        name="P14",
        title="RSS after the run",
        value=product.server.rss_mb(),
        target=150.0,
        unit="MB",
        at_most=True,
        details={"before_mb": before},
    )


def p15(bench: Bench) -> Figure:
    """What a hundred times as many tasks change; the least of the ratios counts."""
    small, large = _small(bench), _large(bench)
    found: dict[str, Any] = {}
    for name, make in _READS.items():
        sides: Iterator[Side] = ((each.server, make(each), (200,)) for each in (large, small))
        try:
            found[name] = compare(next(sides), next(sides), rounds=bench.rounds, seconds=bench.seconds / 2)
        except servers.Broken as error:  # the others are worth knowing all the same
            found[name] = {"ratio": 0.0, "error": str(error)}
    if not bench.short:  # there P8 measures the same
        found["claim"] = _claims(bench, large, small)
    worst = min(found, key=lambda name: float(found[name]["ratio"]))
    return Figure(
        name="P15",
        title=f"growth: 1e6 tasks to 1e4, least: {worst}",
        value=found[worst]["ratio"],
        target=0.8,
        unit="x",
        details=found,
    )


def _deep(product: Product) -> list[bytes]:
    """The page in the middle of the list, by cursor."""
    total = product.server.must("GET", f"{TASKS}/stats", None, product.token)["total"]
    page = product.server.must("GET", f"{TASKS}?limit=50&offset={total // 2}", None, product.token)
    return [product.get(f"{TASKS}?limit=50&cursor={page['next']}")]


_READS: dict[str, Callable[[Product], list[bytes]]] = {
    "get": lambda product: product.gets(),
    "first page": lambda product: [product.get(f"{TASKS}?limit=50")],
    "deep page": _deep,
    "stats": lambda product: [product.get(f"{TASKS}/stats")],
    "search": lambda product: [product.get(f"{TASKS}?limit=50&search=needle")],
}


def _large(bench: Bench) -> Product:
    return bench.main if bench.short else bench.product("large", LARGE)


def _small(bench: Bench) -> Product:
    return bench.product("tiny", TINY) if bench.short else bench.product("small", SMALL)


def _claims(bench: Bench, one: Product, other: Product) -> dict[str, Any]:
    rounds = bench.rounds
    claimers = [claimer(each, agents=10, slots=1000) for each in (one, other)]
    sides: list[Side] = [
        (
            product.server,
            [request_bytes("POST", f"/api/v1/workers/{each.id}/claim", {"max_tasks": 1}, each.token)],
            (200,),
        )
        for product, each in zip((one, other), claimers, strict=True)
    ]
    found = compare(sides[0], sides[1], rounds=rounds, count=CLAIMS_A_ROUND)
    for product, each in zip((one, other), claimers, strict=True):
        taken = product.server.must("GET", f"/api/v1/workers/{each.id}", None, product.token)["active_leases"]
        if taken != rounds * CLAIMS_A_ROUND + 1:
            raise servers.Broken(f"{rounds * CLAIMS_A_ROUND + 1} claims took {taken} tasks")
    return found


ALL: dict[str, Callable[[Bench], Figure]] = {
    "P1": p1,
    "P3": p3,
    "P4": p4,
    "P5": p5,
    "P14": p14,
    "P2": p2,
    "P3U": p3_uvicorn,
    "P4U": p4_uvicorn,
    "P3F": p3_floor,
    "P6": p6,
    "P7": p7,
    "P12": p12,
    "P13": p13,
    "P9": p9,
    "P10": p10,
    "P11": p11,
    "W1": w1,
    "W2": w2,
    "W3": w3,
    "P8": p8,
    "P15": p15,
}
