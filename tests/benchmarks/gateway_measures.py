"""What the gateway adds to a call to a model, and how many calls it carries beside LiteLLM's proxy."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.bench import Bench, Figure
from tests.benchmarks.rivals import Stoppable, environment
from tests.benchmarks.servers import HERE, LOAD_CORE, Load, Server, load, request_bytes

from corral.testing.server import free_port

QUESTION = [{"role": "user", "content": "Say hello."}]
KEY = "sk-benchmark-key"
ADDED_MS, TIMES = 4.0, 4.0
SHORT_CALLS = 60


def p10(bench: Bench) -> Figure:
    """Milliseconds added at one connection; the calls at 32 connections, to LiteLLM's, stand in the details."""
    port = free_port()
    upstream = Stoppable([sys.executable, str(HERE / "reference_upstream.py"), str(port)], port, core=LOAD_CORE)
    with contextlib.closing(upstream):
        upstream.wait_for("/v1/models")
        folder = bench.seeds.make(0)
        (folder / "corral.toml").write_text(
            '[plugins.llm.providers.bench]\nkind = "openai"\nmodels = [{id = "bench"}]\nmax_concurrency = 64\n'
            f'base_url = "http://127.0.0.1:{port}/v1"\napi_key = "{KEY}"\n'
        )
        product = bench.start(folder)
        mine = request_bytes(
            "POST", "/api/v1/llm/chat/completions", {"model": "bench/bench", "messages": QUESTION}, product.token
        )
        direct = request_bytes("POST", "/v1/chat/completions", {"model": "bench", "messages": QUESTION})
        added = _added(bench, (product.server, [mine]), (upstream, [direct]))
        details = {"added_ms": added}
        if not bench.short:
            carried = details["per_second"] = _rate(bench, product.server, [mine])
            with contextlib.closing(_litellm(bench, port)) as proxy:
                theirs = request_bytes("POST", "/v1/chat/completions", {"model": "bench", "messages": QUESTION}, KEY)
                details["litellm_per_second"] = _rate(bench, proxy, [theirs])
                details["litellm_added_ms"] = _added(bench, (proxy, [theirs]), (upstream, [direct]))
                details["times_litellm"] = carried / details["litellm_per_second"]
        product.server.stop()
    beside = (
        f"; {details['times_litellm']:.1f} x LiteLLM's calls/s (>= {TIMES:g})" if "times_litellm" in details else ""
    )
    return Figure(
        name="P10",
        title=f"gateway: {'least' if bench.short else 'p50'} added to a call{beside}",
        value=added,
        target=ADDED_MS,
        unit="ms",
        at_most=True,
        details=details,
    )


def _added(bench: Bench, through: tuple[Server, Sequence[bytes]], straight: tuple[Server, Sequence[bytes]]) -> float:
    """The median of the rounds; in the short form, which runs beside other tests, what the fastest calls take."""
    if bench.short:
        ours, theirs = (load(*side, count=SHORT_CALLS, connections=1) for side in (through, straight))
        return ours.least_ms - theirs.least_ms

    def p50(server: Server, requests: Sequence[bytes]) -> float:
        found: Load = load(server, requests, seconds=2 * bench.seconds, connections=1)
        return found.p50_ms

    p50(*through)
    return statistics.median(p50(*through) - p50(*straight) for _ in range(bench.rounds))


def _rate(bench: Bench, server: Server, requests: Sequence[bytes]) -> float:
    load(server, requests, seconds=0.5)
    return statistics.median(load(server, requests, seconds=2 * bench.seconds).per_second for _ in range(5))


def _litellm(bench: Bench, upstream: int) -> Stoppable:
    home = Path(bench.folder / "litellm")
    home.mkdir()
    (home / "config.yaml").write_text(
        "model_list:\n  - model_name: bench\n    litellm_params:\n"
        f"      {{model: openai/bench, api_base: 'http://127.0.0.1:{upstream}/v1', api_key: {KEY}}}\n"
        f"general_settings: {{master_key: {KEY}}}\n"
    )
    program = environment("litellm", ["litellm[proxy]"]) / "bin" / "litellm"
    port = free_port()
    command = [str(program), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    server = Stoppable(command, port, environ={"HOME": str(home)}, log=home / "log", cwd=home)
    server.wait_for("/health/liveliness", 180.0)
    return server
