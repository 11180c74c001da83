"""S6: parallel refreshes over two processes leave one successor and sign nobody out; a token that comes back after the
grace ends its session, every time.

Short form: 6 rounds and 10 thefts; long form (`--long`): 1,000 rounds and 100 thefts.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from corral.testing.server import EMAIL, PASSWORD, ServerProcess

PARALLEL, GRACE = 50, 20


def sign_in(server: ServerProcess) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post("/auth/login", json={"email": EMAIL, "password": PASSWORD}).raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_s6_parallel_refreshes_and_late_ones(database_url: str, tmp_path: Path, long_form: bool, figure: Any) -> None:
    rounds, thefts = (1000, 100) if long_form else (6, 10)
    arguments = ("--processes", "2", "--no-embedded-worker")
    environ = {"CORRAL_REFRESH_GRACE": str(GRACE)}
    with (
        ServerProcess(tmp_path, database_url=database_url, arguments=arguments, environ=environ) as server,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        clients = [server.client() for _ in range(PARALLEL)]

        def refresh(number: int, token: str) -> tuple[int, Any]:
            answer = clients[number].post("/auth/refresh", json={"refresh_token": token})
            return answer.status_code, answer.json()

        token, signed_out, several = sign_in(server)["refresh_token"], 0, 0
        for _ in range(rounds):
            answers = list(pool.map(lambda number: refresh(number, token), range(PARALLEL)))  # noqa: B023  # done here
            signed_out += sum(status != 200 for status, _ in answers)
            successors = {body["refresh_token"] for status, body in answers if status == 200}
            several += len(successors) != 1
            token = successors.pop()
        sessions = [sign_in(server)["refresh_token"] for _ in range(min(thefts, 19))]
        ended = 0
        for _ in range(-(-thefts // len(sessions))):
            first = sessions
            second = [refresh(0, each)[1] for each in first]
            time.sleep(GRACE + 0.5)
            for old, new in zip(first, second, strict=True):
                status, body = refresh(1, old)
                after = refresh(2, new["refresh_token"])[0]
                with server.client(new["access_token"]) as thief:
                    ended += (status, body["code"], after, thief.get("/auth/me").status_code) == (
                        401,
                        "token_reuse",
                        401,
                        401,
                    )
            sessions = [sign_in(server)["refresh_token"] for _ in sessions]
        stolen = len(sessions) * -(-thefts // len(sessions))
        for client in clients:
            client.close()
    figure("S6", {"rounds": rounds, "signed_out": signed_out, "several": several, "stolen": stolen, "ended": ended})
    assert (signed_out, several) == (0, 0)
    assert ended == stolen
