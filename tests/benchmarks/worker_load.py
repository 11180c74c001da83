"""Workers that do nothing, as one process: each claims, starts and completes, one task at a time, on one connection.

Reads a job as JSON on standard input, prints the result as JSON:
`{"port", "workers": [{"id", "token"}…], "count"}` -> `{"count", "seconds", "per_second"}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


class Worker:
    """One worker and its connection."""

    def __init__(self, identifier: str, token: str) -> None:
        self._id, self._token = identifier, token
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._left = 0

    async def run(self, port: int, left: list[int]) -> None:
        """Until `left` is used up, or nothing can be claimed."""
        while left[0] > 0:
            claimed = await self._post(port, f"workers/{self._id}/claim", {"max_tasks": 1, "wait_seconds": 0})
            for claim in claimed["tasks"]:
                path = f"tasks/{claim['task']['id']}"
                await self._post(port, f"{path}/start", {"lease_id": claim["lease_id"]})
                await self._post(port, f"{path}/complete", {"lease_id": claim["lease_id"], "result": {"text": "done"}})
                left[0] -= 1
            if not claimed["tasks"]:
                return

    async def _post(self, port: int, path: str, body: dict[str, Any]) -> Any:
        if self._left == 0:  # servers close a connection after some number of requests
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
            self._left = 900
        self._left -= 1
        content = json.dumps(body).encode()
        self._writer.write(
            f"POST /api/v1/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self._token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        start = head.index(b"content-length:") + 15
        answer = await self._reader.readexactly(int(head[start : head.index(b"\r", start)]))
        if not head.startswith(b"http/1.1 200 "):
            raise SystemExit(f"POST {path} -> {head[:60]!r} {answer[:500]!r}")
        return json.loads(answer)


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do the job."""
    left = [job["count"]]
    began = time.perf_counter()
    await asyncio.gather(*[Worker(each["id"], each["token"]).run(job["port"], left) for each in job["workers"]])
    took = time.perf_counter() - began
    done = job["count"] - left[0]
    return {"count": done, "seconds": took, "per_second": done / took}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
