"""S15: random paths, ids, methods and people, and every operation by callers of several kinds: the series of `/metrics`
stay bounded, none of them tells of a person, an id or a path, and the answer comes fast.

Short form: 3 000 requests; long form (`--long`): 50 000.
"""

from __future__ import annotations

import asyncio
import random
import string
import time
from typing import Any

import pytest
from tests.generated.world import World

from corral.ids import new_id
from corral.testing.kit import Client

pytestmark = pytest.mark.one_engine

MOST_SERIES, MOST_SECONDS = 2000, 0.1
SHORT, LONG = 3_000, 50_000
ALPHABET = string.ascii_letters + string.digits + "-_.~"


def word(rng: random.Random) -> str:
    return "".join(rng.choices(ALPHABET, k=rng.randint(1, 12)))


async def scrape(world: World) -> tuple[list[str], float]:
    """The series, and how long the answer took; what was scraped a moment ago is not given again."""
    await asyncio.sleep(1.1)
    began = time.perf_counter()
    answer = await world.kit.client.get("/metrics", root=True)
    took = time.perf_counter() - began
    assert answer.status == 200
    return [line for line in answer.body.decode().splitlines() if line and not line.startswith("#")], took


async def storm(world: World, count: int) -> set[str]:
    """So many requests, no two alike; what must be found in no series."""
    rng, told = random.Random(15), set()
    clients = [world.admin, world.viewer, world.kit.client, world.worker]
    for number in range(count):
        identifier, odd = new_id(), f"zz{word(rng)}{number}"
        path = rng.choice(
            (f"/{odd}", f"/tasks/{identifier}", f"/agents/{identifier}/{odd}", f"/tools/{odd}", f"/{odd}/{odd}")
        )
        method = rng.choice(("GET", "GET", "POST", "DELETE", word(rng).upper()))
        headers = {
            "user-agent": odd,
            "x-forwarded-for": f"10.{number % 256}.1.{number % 251}",
            "x-request-id": odd[:60],
        }
        await rng.choice(clients).request(method, f"{path}?{odd}={odd}" if number % 7 == 0 else path, headers=headers)
        told |= {identifier, odd} if number % 50 == 0 else set()
    return told


async def test_s15_metric_series(make_world: Any, long_form: bool, figure: Any) -> None:
    world: World = await make_world()
    people: list[Client] = [world.admin, world.owner, world.viewer, world.worker, world.kit.client]
    for operation in world.operations:
        if not operation.path.endswith("/stream"):
            for client in people:
                await client.request(
                    operation.method, operation.at() + operation.sample_query(), operation.sample_body()
                )
    told = await storm(world, LONG if long_form else SHORT)
    told |= {each.user["id"] for each in people if each.user} | {"example.org"}
    scraped = [await scrape(world) for _ in range(5)]
    series, seconds = scraped[-1][0], min(took for _, took in scraped)
    figure("S15", {"requests": LONG if long_form else SHORT, "series": len(series), "answer_ms": round(seconds * 1000)})
    assert not [line for line in series if any(each in line for each in told)]
    assert len(series) <= MOST_SERIES
    assert seconds <= MOST_SECONDS
