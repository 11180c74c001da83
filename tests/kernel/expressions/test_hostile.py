"""Hostile expressions end soon, and other requests do not wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.limits import Stopwatch

from corral_core.expressions.api import Expressions, TemplateError

pytestmark = pytest.mark.one_engine
ROOTS = ("input",)
SECONDS = 1.5
HEALTH_SECONDS = 0.05
BIG: dict[str, Any] = {
    "input": {"l": [{"i": i, "s": "x" * 20} for i in range(12_000)], "s": "a" * 300_000, "n": 1, "o": {"k": "v"}}
}
SLOW = [  # each runs into the limit of time or memory
    "input.l.map(x, x.i)",
    "input.l.filter(x, input.l[x.i].i >= 0).size()",
    "input.l.all(x, size(input.l) > 0)",
    "input.s.matches('([a-z]{1,500}){1,20}c')",
    " + ".join(["input.s"] * 400),
    "input.l.map(x, input.s)",
    "input.l.map(x, json(input.l))",
    "input.l.map(x, input.s + input.s + input.s + input.s)",
    "split(input.s, 'a').map(x, split(input.s, 'a'))",
    "input.l.exists(x, input.l == [x])",
]
QUICK = [
    *("(" * n + "1" + ")" * n for n in (31, 32, 33, 200, 2000)),
    *("[" * n + "]" * n for n in (32, 33, 2000)),
    *("{1:" * n + "1" + "}" * n for n in (32, 33, 1000)),
    *("!" * n + "true" for n in (100, 4000)),
    *("-" * n + "1" for n in (100, 4000)),
    *("true?1:" * n + "1" for n in (30, 500)),
    *("1" + "+1" * n for n in (200, 2000)),
    "input" + ".o" * 1000,
    "input" + "[0]" * 1000,
    "size(" * 30 + "input.s" + ")" * 30,
    "json(" * 30 + "'\"'" + ")" * 30,
    "replace(" * 20 + "input.s" + ", 'a', 'aaaaaaaaaa')" * 20,
    "input.l.map(x, input.l.map(y, input.l.map(z, z)))",
    "[1].map(x, " * 20 + "x" + ")" * 20,
    "parse_json('" + "[" * 3000 + "')",
    "parse_json('" + "[" * 1500 + "]" * 1500 + "')",
    "string(" + "[" * 30 + "1" + "]" * 30 + ")",
    "9223372036854775807 * 9223372036854775807",
    "round(1e308) + round(1e300, 15)",
    "duration('9999999999999h')",
    "timestamp('9999-12-31T23:59:59Z') + duration('1000000h')",
    "input.__class__.__mro__",
    "input.o.__init__.__globals__",
    "input.s.format(input)",
    "get(input, '" + "a." * 1500 + "')",
    "get(input, '__class__.__subclasses__')",
    "__import__('os').system('id')",
    "now.__call__()",
    "get.__globals__",
    "json.__module__",
    "'\\ud800'",
    "b'\\xff'",
    "'a'.matches('" + "(" * 500 + "a" + ")*" * 500 + "')",
    "'a'.matches('a{1000}{1000}{1000}')",
    "'" + "x" * 4090 + "'",
    "[" + "1," * 1900 + "1]",
    "&&||&&",
    "input[input]",
    "\x00",
    "input.l.map(input, input)",
]


def hostile(count: int) -> list[str]:
    """Expressions of the lists above and variants of them, the same in every run."""
    chosen = random.Random(8)
    found = [*SLOW, *QUICK]
    while len(found) < count:
        text = chosen.choice(QUICK if len(found) % 10 else SLOW)
        cut = chosen.randrange(1, len(text) + 1)
        found.append(
            chosen.choice(
                (text[:cut], text[cut:], f"!({text})", f"({text}) == ({text})"[:4096], f"[{text}]", f"{text} + {text}")
            )
        )
    return found


async def test_workflows_8_hostile_expressions_end_in_time_and_health_answers_meanwhile(
    make_kit: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    kit = await make_kit()
    expressions: Expressions = kit.kernel.container.get(Expressions)
    is_long = request.config.getoption("--long")
    texts = hostile(500) if is_long else [SLOW[1], SLOW[5], *QUICK]
    waits: list[float] = []
    done = asyncio.Event()

    async def ask_health() -> None:
        while not done.is_set():
            began = time.perf_counter()
            assert (await kit.client.get("/health")).status == 200
            waits.append(time.perf_counter() - began)
            await asyncio.sleep(0.005)

    asking = asyncio.ensure_future(ask_health())
    longest, values = 0.0, 0
    for text in texts:
        with Stopwatch() as watch:
            expressions.check_expression(text, roots=ROOTS, pointer="/filter")
            with contextlib.suppress(TemplateError):
                await expressions.evaluate(text, BIG)
                values += 1
        longest = max(longest, watch.seconds)
    done.set()
    await asking
    p99 = statistics.quantiles(waits, n=100)[98]
    print(
        f"{len(texts)} expressions, {values} with a value, longest {longest:.2f} s, p99 of /health {p99 * 1000:.1f} ms"
    )
    assert longest <= SECONDS
    assert p99 <= HEALTH_SECONDS * (1 if is_long else 5)  # the short form shares its cores with other tests
