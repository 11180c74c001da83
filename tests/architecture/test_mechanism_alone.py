"""The mechanism boots with a plugin of the test and none of Corral's; a route, a unit, an event and a job work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = '''
from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from corral.asgi.application import Application
from corral.cli.data_folder import ensure_data_dir
from corral.config.reader import load as load_config
from corral.events.consumers import Subscriber
from corral.events.event import Event, emit
from corral.events.log import EventRow, LoggedEvent
from corral.auth.principal import PUBLIC
from corral.http.routes import Routes
from corral.jobs.job import Job, JobRow, enqueue
from corral.kernel import boot
from corral.plugin import Plugin, Provide, hookimpl
from corral.plugins.discovery import Found
from corral.plugins.loading import load

routes = Routes("/pings", tag="Pings")


class Pings:
    def __init__(self) -> None:
        self.handled: list[str] = []


class PingSent(Event, kw_only=True):
    """A ping was sent."""

    event = "ping.sent"


class Sent(msgspec.Struct, frozen=True):
    events: int
    jobs: int


@routes.post("/", needs=PUBLIC, status=201)
def send_ping() -> Sent:
    """Send a ping."""
    emit(PingSent(), object=("ping", "1"))
    enqueue("pings.count")
    return read_pings()


@routes.get("/", needs=PUBLIC)
def read_pings() -> Sent:
    """Count the pings."""
    return Sent(events=EventRow.select().count(), jobs=JobRow.select().count())


def count_pings(pings: Pings) -> None:
    pings.handled.append("job")


def hear_ping(event: LoggedEvent, pings: Pings) -> None:
    pings.handled.append(event.type)


class PingsPlugin(Plugin):
    """Pings: a route, an event and a job."""

    name = "pings"

    @hookimpl
    def corral_services(self):
        return [Provide(Pings, Pings)]

    @hookimpl
    def corral_routes(self):
        return [routes]

    @hookimpl
    def corral_events(self):
        return [PingSent]

    @hookimpl
    def corral_subscribers(self):
        return [Subscriber("pings.hear", ("ping.sent",), hear_ping)]

    @hookimpl
    def corral_jobs(self):
        return [Job("pings.count", count_pings)]


async def main() -> None:
    config = load_config({}, path=Path(os.devnull), overrides={"data_dir": sys.argv[1]})
    ensure_data_dir(config)
    kernel = boot(config, plugins=load([Found(name="pings", load=lambda: PingsPlugin)], config))
    client = Application(kernel).app.test_client()
    await kernel.start()
    try:
        sent = await client.post("/api/v1/pings")
        assert sent.status_code == 201, await sent.get_data()
        read = await client.get("/api/v1/pings")
        assert await read.get_json() == {"events": 1, "jobs": 1}
        async with asyncio.timeout(60):
            while sorted(kernel.container.get(Pings).handled) != ["job", "ping.sent"]:
                await asyncio.sleep(0.02)
    finally:
        await kernel.stop()
    foreign = [name for name in sys.modules if name.partition(".")[0] in ("corral_core", "corral_plugins")]
    assert foreign == [], foreign


asyncio.run(main())
'''


def test_the_mechanism_needs_no_plugin_of_corral(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(PROGRAM, "utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "alone.py"), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
