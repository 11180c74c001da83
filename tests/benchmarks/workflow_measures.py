"""The workflow engine: steps a second, beside other products that run workflows, and with many runs that have ended."""

from __future__ import annotations

import functools
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import workflow_rivals
from tests.benchmarks.bench import HELLO, Bench, Figure, Product
from tests.benchmarks.servers import Broken, load, request_bytes

from corral import clock

LENGTH, SHORT_LENGTH = 100, 5
AT_ONCE = 1000
FEW, MANY = 1_000, 100_000
WAIT_SECONDS = 300.0
RIVALS = {"DBOS": workflow_rivals.dbos, "Prefect": workflow_rivals.prefect}
RIVAL_RUNS = {"DBOS": 200, "Prefect": 20}
"""Each run at once costs the others a second or so, and their rates do not depend on the number."""
STEP_PLUGIN = '''"""A step type that does nothing."""

from corral.plugin import Plugin, hookimpl
from corral_plugins.workflows.api import StepContext, StepResult, StepType


async def execute(context: StepContext) -> StepResult:
    """Return a small object."""
    return StepResult(output={"n": context.attempt})


class NoopStepPlugin(Plugin):
    """Contributes a step type that does nothing."""

    name = "noop_step"
    wants = ("workflows",)

    @hookimpl(optionalhook=True)
    def corral_workflow_steps(self) -> list[StepType]:
        return [StepType(type="noop", title="Do nothing", schema={"type": "object"}, execute=execute)]
'''


def w1(bench: Bench) -> Figure:
    """Steps of one run after the other, each of which is committed before the next begins."""
    product = _product(bench)
    rounds, length = (1, 40) if bench.short else (5, LENGTH)
    workflow = _workflow(product, length)
    _run(product, workflow, 1)
    ratios, rates = [], []
    for _ in range(rounds):
        hello = load(bench.hello, HELLO, seconds=bench.seconds)
        rates.append(length / _run(product, workflow, 1))
        ratios.append(rates[-1] / hello.per_second)
    details: dict[str, Any] = {"per_second": rates, "ratios": ratios}
    beside = "" if bench.short else _beside(bench, details, "one", statistics.median(rates))
    return Figure(
        name="W1",
        title=f"steps/s of a workflow of {length} steps{beside}",
        value=statistics.median(ratios),
        target=0.1,
        unit="H",
        details=details,
    )


def w2(bench: Bench) -> Figure:
    """Steps of many runs that are started at once."""
    product, runs = _product(bench), 20 if bench.short else AT_ONCE
    workflow = _workflow(product, SHORT_LENGTH)
    _run(product, workflow, 1)
    hello = load(bench.hello, HELLO, seconds=bench.seconds)
    rate = runs * SHORT_LENGTH / _run(product, workflow, runs)
    details: dict[str, Any] = {"per_second": rate}
    beside = "" if bench.short else _beside(bench, details, "many", rate)
    return Figure(
        name="W2",
        title=f"steps/s of {runs} runs at once{beside}",
        value=rate / hello.per_second,
        target=0.1,
        unit="H",
        details=details,
    )


def w3(bench: Bench) -> Figure:
    """Steps with many runs that have ended to those with few."""
    few, many = (20, 2_000) if bench.short else (FEW, MANY)
    sides = [_seeded(bench, size) for size in (many, few)]
    rates: list[list[float]] = [[], []]
    for _ in range(2 if bench.short else 7):
        for found, (product, workflow) in zip(rates, sides, strict=True):
            found.append(LENGTH / _run(product, workflow, 1))
    ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
    return Figure(
        name="W3",
        title=f"growth: steps/s with {many:g} ended runs to those with {few:g}",
        value=ratio,
        target=0.8,
        unit="x",
        details={"per_second": rates[0], "other_per_second": rates[1]},
    )


def _product(bench: Bench) -> Product:
    return bench.product_in("workflows", _folder)


def _folder(bench: Bench) -> Path:
    """An installation with the step type."""
    folder = bench.seeds.make(0)
    package = folder / "plugins" / "bench_noop_step"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plugin.py").write_text(STEP_PLUGIN)
    info = folder / "plugins" / "bench_noop_step-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-noop-step\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[corral.plugins]\nnoop_step = bench_noop_step.plugin:NoopStepPlugin\n")
    toml = f'[plugins]\ndir = "{folder / "plugins"}"\nenabled = ["noop_step"]\n'
    (folder / "corral.toml").write_text(toml + f'[settings]\n"workflows.max_active_runs" = {AT_ONCE}\n')
    return folder


def _workflow(product: Product, length: int) -> str:
    """A workflow of steps that follow each other; its id."""
    steps = [{"name": f"s{n}", "step_type": "noop", "order": n} for n in range(length)]
    made = product.server.must("POST", "/api/v1/workflows/", {"name": "bench", "steps": steps}, product.token)
    return str(made["id"])


def _run(product: Product, workflow: str, count: int) -> float:
    """Run a workflow so many times at once; the seconds from the first start to the last end."""
    server, token, path = product.server, product.token, f"/api/v1/workflows/{workflow}/runs"
    before = clock.now()
    start = request_bytes("POST", f"/api/v1/workflows/{workflow}/run", {"input": {}}, token)
    load(server, [start], count=count, accept=(202,))
    until = time.monotonic() + WAIT_SECONDS
    while server.must("GET", f"{path}?status=queued&status=running&limit=1", None, token)["items"]:
        if time.monotonic() > until:
            raise Broken(f"{count} runs did not end within {WAIT_SECONDS:g} s")
        time.sleep(0.05)
    runs: list[Any] = []
    cursor = ""
    while len(runs) < count:
        page = server.must("GET", f"{path}?since={before}&limit=200{cursor}", None, token)
        runs += page["items"]
        cursor = f"&cursor={page['next']}"
    if any(run["status"] != "completed" for run in runs):
        raise Broken(f"runs did not complete: {[run for run in runs if run['status'] != 'completed'][:2]}")
    began = min(clock.parse_instant(run["created_at"]) for run in runs)
    return max(clock.parse_instant(run["finished_at"]) for run in runs) - began


def _seeded(bench: Bench, size: int) -> tuple[Product, str]:
    """A product with so many runs that have ended, and a workflow of it."""
    folder = _folder(bench)
    product = bench.start(folder)
    short, workflow = _workflow(product, SHORT_LENGTH), _workflow(product, LENGTH)
    _run(product, short, 1)
    product.server.stop()
    _copy_run(folder / "data" / "corral.db", short, size)
    product = bench.start(folder)
    _run(product, workflow, 1)
    return product, workflow


def _copy_run(path: Path, workflow: str, size: int) -> None:
    """Copy the run of a workflow, with its steps, so many times. The ids of the copies are older than all others."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript("PRAGMA journal_mode=off; PRAGMA synchronous=off; PRAGMA cache_size=-400000; BEGIN;")
    numbers = "WITH RECURSIVE copies(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM copies WHERE i < :size)"
    replaced = {
        "workflows_runs": {"id": "printf('01800000-0000-7000-8000-%012x', i)", "number": "number + i"},
        "workflows_step_runs": {
            "id": "printf('01800000-0000-7000-8%03x-%012x', t.rowid & 4095, i)",
            "run_id": "printf('01800000-0000-7000-8000-%012x', i)",
        },
    }
    for table, changed in replaced.items():
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        values = ", ".join(changed.get(column, f't."{column}"') for column in columns)
        names = ", ".join(f'"{column}"' for column in columns)
        of_run = (
            "t.workflow_id = :workflow"
            if table == "workflows_runs"
            else ("t.run_id = (SELECT id FROM workflows_runs WHERE workflow_id = :workflow ORDER BY id DESC LIMIT 1)")
        )
        connection.execute(
            f"{numbers} INSERT INTO {table} ({names}) SELECT {values} FROM copies, {table} t WHERE {of_run}",
            {"size": size, "workflow": workflow},
        )
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode=wal")
    connection.close()


def _beside(bench: Bench, details: dict[str, Any], which: str, mine: float) -> str:
    """How many times the rates of other products this rate is."""
    told = []
    for name, run in RIVALS.items():
        sizes = {"length": LENGTH, "rounds": 3, "runs": RIVAL_RUNS[name], "short": SHORT_LENGTH}
        rates = bench.once(f"workflows of {name}", functools.partial(run, bench.folder, **sizes))
        theirs = getattr(rates, which)
        rate = statistics.median(theirs) if isinstance(theirs, list) else theirs
        details[name] = {"per_second": rate, "times": mine / rate}
        told.append(f"{mine / rate:.1f} x {name}")
    return "; " + ", ".join(told)
