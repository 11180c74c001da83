"""S5: signing in with a wrong password takes as long for an address that has an account as for one that has none.

Known and unknown take turns, so that a busy machine burdens both alike. Short form: 100 each, within 15 %; long form
(`--long`): 500 each, within 5 %.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from corral.testing.server import PASSWORD, ServerProcess

pytestmark = pytest.mark.one_engine

ATTEMPTS = 19  # of each address: one more would lock it


def test_s5_known_and_unknown_addresses_take_the_same_time(
    database_url: str, tmp_path: Path, long_form: bool, figure: Any
) -> None:
    count, limit = (500, 0.05) if long_form else (100, 0.15)
    took: dict[str, list[float]] = {"known": [], "unknown": []}
    environ = {"CORRAL_LOCKOUT_THRESHOLD": "20", "CORRAL_REGISTRATION": "open"}
    with ServerProcess(tmp_path, database_url=database_url, environ=environ) as server, server.client() as client:
        for number in range(-(-count // ATTEMPTS)):
            body = {"email": f"known{number}@example.org", "password": PASSWORD, "full_name": "Somebody"}
            client.post("/auth/register", json=body).raise_for_status()
        for number in range(count):
            for kind in random.sample(sorted(took), 2):
                body = {"email": f"{kind}{number // ATTEMPTS}@example.org", "password": "a guess that is wrong"}
                began = time.perf_counter()
                answer = client.post("/auth/login", json=body)
                took[kind].append(time.perf_counter() - began)
                assert answer.status_code == 401, answer.text
    known, unknown = (statistics.median(took[kind]) * 1000 for kind in ("known", "unknown"))
    differ = abs(known - unknown) / max(known, unknown)
    figure(
        "S5", {"each": count, "known_ms": round(known, 2), "unknown_ms": round(unknown, 2), "differ": round(differ, 4)}
    )
    assert differ < limit
