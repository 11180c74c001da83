"""The same work by other products, in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.bench import TASKS, Bench, Figure, Product, Side
from tests.benchmarks.rivals import AGENTOS, LANGGRAPH, PREFECT
from tests.benchmarks.seeds import PATTERN
from tests.benchmarks.servers import load, request_bytes

RIVALS = (PREFECT, AGENTOS, LANGGRAPH)
GETS, CREATES = (45.0, 14.0, 5.0), (20.0, 7.0, 6.0)


def p6(bench: Bench) -> Figure:
    """GET by id."""
    return _against(bench, "P6", "GET by id", GETS, 0, lambda rival: 200, 32)


def p7(bench: Bench) -> Figure:
    """Create."""
    return _against(bench, "P7", "create", CREATES, 1, lambda rival: rival.created, None)


def _against(
    bench: Bench, name: str, title: str, targets: Sequence[float], which: int, accept: Any, connections: int | None
) -> Figure:
    """The least of the ratios, each as a part of its target; on uvicorn, with those on Hypercorn beside them."""
    sides = [_side(bench.on_uvicorn, which), _side(bench.main, which)]
    found: dict[str, Any] = {}
    for rival, target in zip(RIVALS, targets, strict=True):
        folder = bench.folder / name
        folder.mkdir(exist_ok=True)
        with rival.start(folder) as server:
            theirs = [rival.prepare(server)[which]]
            at_once = connections or rival.connections
            other: Side = (server, theirs, (accept(rival),))
            (ratio, rates), (hypercorn, _) = (_ratio(bench, side, other, at_once) for side in sides)
            found[rival.name] = {
                "ratio": ratio,
                "hypercorn_ratio": hypercorn,
                "target": target,
                "per_second": rates[0],
                "other_per_second": rates[1],
            }
    on_hypercorn = ", ".join(f"{each['hypercorn_ratio']:.1f} x" for each in found.values())
    worst = min(found, key=lambda name: float(found[name]["ratio"] / found[name]["target"]))
    wanted = ", ".join(f"{rival.name} {target:g} x" for rival, target in zip(RIVALS, targets, strict=True))
    return Figure(
        name=name,
        title=f"{title} on uvicorn, to {wanted}; least: {worst}; on Hypercorn {on_hypercorn}",
        value=found[worst]["ratio"] / found[worst]["target"],
        target=1.0,
        unit="of target",
        details=found,
    )


def _side(product: Product, which: int) -> Side:
    requests = (product.gets(), [request_bytes("POST", TASKS, PATTERN, product.token)])[which]
    return product.server, requests, (200, 201)


def _ratio(bench: Bench, one: Side, other: Side, connections: int) -> tuple[float, tuple[float, float]]:
    pairs = []
    for _ in range(5):
        mine = _rate(one, 2 * bench.seconds, connections)
        pairs.append((mine, _rate(other, 2 * bench.seconds, connections, strict=False)))
    return statistics.median(a / b for a, b in pairs), (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
    )


def _rate(side: Side, seconds: float, connections: int, *, strict: bool = True) -> float:
    """Not `strict` with other products: Prefect refuses some, or resets the connection, also with one at a time."""
    server, requests, accept = side
    return load(server, requests, accept=accept, seconds=seconds, connections=connections, strict=strict).per_second
