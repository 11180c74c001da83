"""Done when, of the page on plugins, what takes several processes: 3 and 4.

1 is in `cli/test_new_plugin.py`, 2 and 6 in `test_plugins_contract.py`, 3 under load in `promises/test_s11_plugins.py`,
5 in `test_without_each.py`, 7 in `test_safe_mode.py`.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.kernel.cli.warm import warm
from tests.limits import Stopwatch

from corral.testing.plugin_folder import PluginFolder
from corral.testing.server import ServerProcess

COUNTING = '''
"""Counts tasks in a table of its own."""
import peewee

from corral.auth.principal import PUBLIC
from corral.database.model import Model
from corral.events.consumers import Subscriber
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Plugin, hookimpl


class Seen(Model):
    name = peewee.CharField(primary_key=True)
    value = peewee.IntegerField()

    class Meta:
        table_name = "counting_seen"


routes = Routes("/counting", tag="Counting")


@routes.get("/", needs=PUBLIC)
def read_it() -> dict[str, int]:
    """What was counted."""
    return {row.name: row.value for row in Seen.select()}


def one_more(name):
    Seen.insert(name=name, value=1).on_conflict(
        conflict_target=[Seen.name], update={Seen.value: Seen.value + 1}
    ).execute()


def follow(event):
    one_more("tasks")


def tick():
    one_more("ticks")


class Gate:
    def check(self, client_ip, method, path):
        if path == "/api/v1/counting/break":
            raise KeyError(path)


class CountingPlugin(Plugin):
    """Counts."""

    name = "counting"

    @hookimpl
    def corral_routes(self):
        return [routes]

    @hookimpl
    def corral_models(self):
        return [Seen]

    @hookimpl
    def corral_gates(self):
        return [Gate()]

    @hookimpl
    def corral_subscribers(self):
        return [Subscriber("counting.follow", ("task.created",), follow)]

    @hookimpl
    def corral_schedules(self):
        return [Schedule("counting.tick", 0.5, tick)]
'''
UNLUCKY = '''
import os

from corral.plugin import Plugin


class UnluckyPlugin(Plugin):
    """Starts everywhere but in a server."""

    name = "unlucky"

    async def start(self, runtime):
        if os.environ.get("UNLUCKY"):
            raise RuntimeError("not in this server")
'''
MIGRATION = """
from peewee import CharField, IntegerField, Model


def up(migrator, db):
    class Seen(Model):
        name = CharField(primary_key=True)
        value = IntegerField()

        class Meta:
            database = db
            table_name = "counting_seen"

    db.create_tables([Seen])
"""


def until(condition: Callable[[], Any], seconds: float) -> float:
    with Stopwatch() as watch:
        while not condition():
            assert watch.seconds < seconds, f"not within {seconds:g} s"
            time.sleep(0.02)
    return watch.seconds


class Fleet:
    """Two servers on one database; the second one does no jobs."""

    def __init__(self, folder: Path, url: str) -> None:
        plugins = PluginFolder(folder / "plugins")
        plugins.add("counting", COUNTING, {"migrations/0001_initial.py": MIGRATION})
        plugins.add("unlucky", UNLUCKY)
        self.config = folder / "corral.toml"
        self.write('enabled = ["counting"]')
        environ = {
            "CORRAL_CONFIG": str(self.config),
            "CORRAL_PLUGIN_DIR": str(plugins.path),
            "CORRAL_DATA_DIR": str(folder / "data"),
            "CORRAL_ACCESS_TTL": "3600",
            "UNLUCKY": "yes",
        }
        self.servers = []
        for name, more in (("a", ()), ("b", ("--no-jobs",))):
            (folder / name).mkdir()
            arguments = ("--no-embedded-worker", *more)
            server = ServerProcess(folder / name, database_url=url, environ=environ, arguments=arguments)
            self.servers.append(server)

    def write(self, lines: str) -> None:
        """What `[plugins]` says."""
        self.config.write_text(f"[database]\nmigrate_on_start = true\n[plugins]\n{lines}\n", "utf-8")

    def restart(self) -> list[httpx2.Client]:
        """End both, start both; their admins. The first start makes the installation, so it comes alone."""
        running = [server for server in self.servers if server.process is not None and server.process.poll() is None]
        with ThreadPoolExecutor() as pool:
            if running:
                assert [*pool.map(lambda server: server.stop(), running)] == [0] * len(running)
            else:
                self.servers[0].start()
            down = self.servers if running else self.servers[1:]
            for _ in pool.map(lambda server: server.start(), down):
                continue
        return [server.sign_in() for server in self.servers]


@pytest.fixture
def fleet(tmp_path: Path, database_url: str) -> Iterator[Fleet]:
    made = Fleet(tmp_path, database_url)
    yield made
    for server in made.servers:
        server.kill()


def counted(admin: httpx2.Client, name: str) -> int:
    return int(admin.get("/counting").json().get(name, 0))


def test_plugins_4_disable_acts_everywhere_and_enable_loses_nothing(fleet: Fleet) -> None:
    # `[plugins] enabled` would win over what the API says, so a built-in plugin is taken for the rule across restarts
    one, two = fleet.restart()
    assert one.post("/plugins/counting/disable", json={}).json()["code"] == "setting_locked"
    took = []
    for first, second in ((one, two), (two, one)):
        assert first.post("/plugins/agents/disable", json={}).json()["code"] == "in_use"
        assert first.post("/plugins/realtime/disable", json={"reason": "too loud"}).status_code == 200
        took.append(until(lambda: second.get("/plugins/realtime").json()["state"] == "disabled", 20))  # noqa: B023  (in time)
        assert second.get("/plugins/realtime").json()["reason"] == "too loud"
        assert first.post("/plugins/realtime/enable", json={}).json()["state"] == "active"
        took.append(until(lambda: second.get("/plugins/realtime").json()["state"] == "active", 20))  # noqa: B023  (in time)
    assert sorted(took)[1] < 2.0, took  # one of four may be the machine's fault
    assert one.post("/plugins/realtime/disable", json={"reason": "too loud"}).status_code == 200
    one, two = fleet.restart()
    for admin in (one, two):
        assert admin.get("/plugins/realtime").json()["state"] == "disabled"  # and not even loaded
    answer = one.post("/plugins/realtime/enable", json={})
    assert (answer.status_code, answer.json()["pending_reload"]) == (202, True)
    one, two = fleet.restart()
    assert [admin.get("/plugins/realtime").json()["state"] for admin in (one, two)] == ["active", "active"]


def test_plugins_4_what_waited_is_done_after_a_restart(fleet: Fleet) -> None:
    one, two = fleet.restart()
    assert two.post("/tasks", json={"title": "before"}).status_code == 201
    until(lambda: counted(one, "tasks") == 1 and counted(one, "ticks") > 0, 60)
    fleet.write("enabled = []")
    one, two = fleet.restart()
    assert one.get("/counting").status_code == 404
    for number in range(3):
        assert two.post("/tasks", json={"title": f"meanwhile {number}"}).status_code == 201
    fleet.write('enabled = ["counting"]')
    one, two = fleet.restart()
    ticks = counted(one, "ticks")
    until(lambda: counted(two, "tasks") == 4 and counted(two, "ticks") > ticks, 60)  # data, jobs, subscriptions


def test_plugins_4_the_command_has_a_running_server_reload(fleet: Fleet) -> None:
    """It waits until the server has reloaded, and tells what did not work, as `corral status` does afterwards."""
    fleet.write("enabled = []")
    server = fleet.servers[0]
    with server.start().sign_in() as admin:
        signed_in = {"CORRAL_URL": server.address, "CORRAL_TOKEN": admin.headers["Authorization"].split()[1]}

        def command(*arguments: str, **environ: str) -> tuple[int, str, str]:
            own = {**server.environ, **signed_in, "UNLUCKY": "", "COLUMNS": "200", **environ}
            done = warm().run(arguments, cwd=server.folder, environ=own, stdin="")
            return done.returncode, done.stdout, done.stderr

        said: list[str] = []

        def reloading(*arguments: str, **environ: str) -> tuple[int, str, str]:
            """Repeat the command where the machine is so slow that the new processes are not ready in time."""
            for _ in range(5):
                done = command(*arguments, **environ)
                if "it was not ready in time" not in done[2]:
                    break
            return done

        def told_by_status(**environ: str) -> str:
            """What status says, once the server answers, which it may not do in time after a reload."""

            def is_told() -> bool:
                code, printed, _ = command("status", **environ)
                if code == 0:
                    said.append(printed)
                return code == 0

            until(is_told, 240)
            return said[-1]

        def answers(status: int) -> bool:
            with contextlib.suppress(httpx2.HTTPError):
                return admin.get("/counting").status_code == status
            return False

        assert answers(404)
        status, out, err = reloading("plugins", "enable", "counting")
        assert (status, out.endswith("The server has reloaded.\n")) == (0, True), (out, err)
        assert "Waiting for the server to reload." in err
        until(lambda: answers(200), 240)  # the old process may have accepted the connection
        status, out, err = reloading("plugins", "enable", "unlucky", "--json")
        assert (status, json.loads(out)["reloading"]) == (1, 1), (out, err)
        assert "plugin unlucky is failed: RuntimeError: not in this server" in err
        assert "undo the change: corral plugins disable unlucky" in err
        told = told_by_status()
        assert re.search(r"^plugins: +unlucky is failed: .*not in this server", told, re.M), told
        assert "last reload:" not in told
        fleet.config.write_text('server.public_url = "${ADDRESS}"\n' + fleet.config.read_text())
        status, out, err = command("plugins", "disable", "counting", ADDRESS="http://corral.example")
        assert (status, "The server has reloaded" in out) == (1, False), (out, err)
        assert "the server could not reload, and continues with its old plugins: " in err
        until(lambda: answers(200), 240)
        told = told_by_status(ADDRESS="http://corral.example")
        assert re.search(r"^last reload: +failed, so the server runs as before: .*ADDRESS", told, re.M), told
        fleet.write("enabled = []")
        assert reloading("plugins", "disable", "messages")[0] == 0
        until(lambda: answers(404), 240)
        assert "last reload:" not in told_by_status()


def test_plugins_3_a_faulty_plugin_is_held_everywhere_and_again_after_a_crash(fleet: Fleet) -> None:
    one, two = fleet.restart()
    for _ in range(5):
        assert two.get("/counting/break").status_code == 404
    until(lambda: two.get("/plugins/counting").json()["state"] == "quarantined", 10)
    until(lambda: one.get("/plugins/counting").json()["state"] == "quarantined", 10)
    assert one.post("/tasks", json={"title": "meanwhile"}).status_code == 201
    for server in fleet.servers:
        server.kill()
    one, two = (server.start().sign_in() for server in fleet.servers)
    seen = one.get("/plugins/counting").json()
    assert (seen["state"], "KeyError" in seen["reason"]) == ("quarantined", True)
    assert one.get("/counting").status_code == 200  # its routes go on
    time.sleep(2)
    assert counted(one, "tasks") == 0
    assert two.post("/plugins/counting/enable", json={}).json()["state"] == "active"
    until(lambda: counted(one, "tasks") == 1, 60)  # its cursor was kept
