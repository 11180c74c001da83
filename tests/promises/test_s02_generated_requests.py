"""S2: requests generated from the OpenAPI document, with ids of what exists, by callers of every kind, on both engines.

No server error but a documented 503, no status, header, code or schema that the document does not have, no ignored
authentication, no wrong value taken for a good one, nothing read that was deleted. Short form: some 700 requests an
engine; long form (`--long`): 100 000. Streams of events are left out: they do not end.
"""

from __future__ import annotations

import time
from typing import Any

from tests.generated.world import World

# Cases of an operation, right and wrong ones each, by two callers: some 700 requests a case.
SHORT, LONG = 1, 150
SEED = 20


async def test_s2_generated_requests(make_world: Any, long_form: bool, figure: Any) -> None:
    from tests.generated.fuzz import Fuzz, report  # imports schemathesis, for a second

    world: World = await make_world()
    fuzz = Fuzz(world, SEED)
    await fuzz.prepare()
    cases = LONG if long_form else SHORT
    began = time.monotonic()
    await fuzz.run(cases, derandomize=not long_form)
    figure(
        "S2",
        {
            "requests": fuzz.count.total(),
            "operations": len(world.operations),
            "accepted": sum(count for status, count in fuzz.count.items() if status < 300),
            "server_errors": sum(count for status, count in fuzz.count.items() if status >= 500 and status != 503),
            "unavailable": fuzz.count[503],
            "faults": len(fuzz.faults),
            "seconds": round(time.monotonic() - began),
        },
    )
    assert not fuzz.faults, report(fuzz.faults)
    assert fuzz.count.total() > (100_000 if long_form else 10 * len(world.operations) * cases // 3)
    assert sum(count for status, count in fuzz.count.items() if status < 300) > fuzz.count.total() / 20
