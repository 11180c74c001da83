"""The same workflows in other products, which run them in a process of their own, on the core of the server.

Each product stores what a step has returned before the next step begins: Corral and DBOS in SQLite, as they set it up,
and Prefect in a file, while its server, also with SQLite, keeps the states. A step returns a small object.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
from tests.benchmarks.rivals import PREFECT, environment
from tests.benchmarks.servers import SERVER_CORE, Broken

SECONDS = 600
DBOS = """import json, sys, time
from dbos import DBOS

DBOS(config={"name": "bench", "system_database_url": "sqlite:///bench.sqlite", "log_level": "ERROR"})


@DBOS.step()
def step(n):
    return {"n": n}


@DBOS.workflow()
def steps(count):
    for n in range(count):
        step(n)
    return count


def at_once(runs, count):
    for handle in [DBOS.start_workflow(steps, count) for _ in range(runs)]:
        handle.get_result()


DBOS.launch()
steps(5)
length, rounds, runs, short = map(int, sys.argv[1:])
took = []
for _ in range(rounds):
    began = time.perf_counter()
    steps(length)
    took.append(time.perf_counter() - began)
began = time.perf_counter()
at_once(runs, short)
print(json.dumps({"one": [length / each for each in took], "many": runs * short / (time.perf_counter() - began)}))
DBOS.destroy()
"""
FLOWS = """import asyncio, json, sys, time
from prefect import flow, task


@task(persist_result=True)
async def step(n):
    return {"n": n}


@flow
async def steps(count):
    for n in range(count):
        await step(n)


places = asyncio.Semaphore(1)  # with more at a time the server answers 503


async def one(count):
    async with places:
        await steps(count)


async def main():
    await steps(5)
    length, rounds, runs, short = map(int, sys.argv[1:])
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        await steps(length)
        took.append(time.perf_counter() - began)
    began = time.perf_counter()
    await asyncio.gather(*(one(short) for _ in range(runs)))
    print(json.dumps({"one": [length / each for each in took], "many": runs * short / (time.perf_counter() - began)}))


asyncio.run(main())
"""


class Rates(msgspec.Struct, kw_only=True):
    """Steps a second: of single long runs, and of many short runs at once."""

    one: list[float]
    many: float


def dbos(folder: Path, *, length: int, rounds: int, runs: int, short: int) -> Rates:
    """DBOS Transact, a library for durable execution."""
    home = folder / "dbos"
    home.mkdir()
    python = environment("dbos", ["dbos>=3,<4"]) / "bin" / "python"
    return _run(python, home, DBOS, (length, rounds, runs, short), {})


def prefect(folder: Path, *, length: int, rounds: int, runs: int, short: int) -> Rates:
    """Prefect with its own server."""
    parent = folder / "prefect-workflows"
    parent.mkdir()
    python = environment(PREFECT.name, PREFECT.packages) / "bin" / "python"
    with PREFECT.start(parent) as server:
        environ = {"PREFECT_API_URL": f"http://127.0.0.1:{server.port}/api", "PREFECT_LOGGING_LEVEL": "ERROR"}
        home = parent / PREFECT.name
        return _run(python, home, FLOWS, (length, rounds, runs, short), {**environ, "HOME": str(home)})


def _run(python: Path, home: Path, code: str, sizes: tuple[int, ...], environ: dict[str, Any]) -> Rates:
    script = home / "workflows.py"
    script.write_text(code)
    done = subprocess.run(
        [str(python), str(script), *map(str, sizes)],
        cwd=home,
        env={**os.environ, **environ},
        text=True,
        capture_output=True,
        check=False,
        timeout=SECONDS,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
    )
    if done.returncode:
        raise Broken(f"the workflows ended with {done.returncode}: {done.stderr[-3000:]}")
    return msgspec.convert(json.loads(done.stdout.splitlines()[-1]), Rates)
