"""H, the unit of all rates: a handler that says hello in JSON, on stock Quart and Hypercorn, served in code too.

`python reference_hello.py PORT` serves until it is terminated.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from hypercorn.asyncio import serve
from hypercorn.config import Config
from quart import Quart

app = Quart("hello")


@app.get("/hello")
async def hello() -> dict[str, str]:
    """Say hello."""
    return {"hello": "world"}


async def main(port: int) -> None:
    """Serve until SIGTERM."""
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.accesslog = None
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await serve(app, config, shutdown_trigger=stopping.wait)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
