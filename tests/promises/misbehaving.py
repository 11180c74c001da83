"""Fourteen plugins that misbehave, each in its own way, and one that counts how often it is called."""

from __future__ import annotations

from corral.testing.plugin_folder import PluginFolder

HEAD = '''
"""A plugin of a test."""
import asyncio
import logging
import os
import threading
import time

import msgspec

from corral.auth.principal import PUBLIC
from corral.events.consumers import Subscriber
from corral.http.routes import Routes
from corral.jobs.job import Schedule
from corral.plugin import Plugin, hookimpl

log = logging.getLogger("%(name)s")
'''
BODY = '''
class %(class)s(Plugin):
    """Of a test."""

    name = "%(name)s"

'''
GATE = """
class Check:
    def check(self, client_ip, method, path):
%(act)s
"""
GATED = """
    @hookimpl
    def corral_gates(self):
        return [Check()]
"""
ROUTE = '''
routes = Routes("/%(name)s", tag="Of a test")


@routes.get("/", needs=PUBLIC)
def read_it() -> dict[str, int]:
    """Answer."""
    %(act)s
'''
SEEN = """

@routes.get("/tasks", needs=PUBLIC)
def list_seen() -> list[str]:
    \"\"\"The tasks of which it was told.\"\"\"
    return sorted(seen)
"""
ROUTED = """
    @hookimpl
    def corral_routes(self):
        return [routes]
"""
STEADY = """
counts = {"gate": 0, "schedule": 0}
seen = set()


def follow(event):
    seen.add(msgspec.json.decode(event.data)["task_id"])  # it may come more than once


def tick():
    counts["schedule"] += 1
"""
STEADY_HOOKS = """
    @hookimpl
    def corral_subscribers(self):
        return [Subscriber("steady.follow", ("task.created",), follow)]

    @hookimpl
    def corral_schedules(self):
        return [Schedule("steady.tick", 0.5, tick)]
"""
SLEEPS = """
def follow(event):
    time.sleep(300)
"""
SLEEPS_HOOKS = """
    @hookimpl
    def corral_subscribers(self):
        return [Subscriber("sleeper.follow", ("task.created",), follow)]
"""
DIES = """
    async def start(self, runtime):
        def die():
            raise RuntimeError("this thread dies")

        async def go_on():
            while True:
                threading.Thread(target=die).start()
                await asyncio.sleep(0.2)

        runtime.supervise("threads", go_on)
"""
FLOODS = """
def flood():
    for number in range(3_000):
        log.warning("a line that nobody needs", extra={"text": os.urandom(8).hex()})  # none repeats another
"""
FLOODS_HOOKS = """
    @hookimpl
    def corral_schedules(self):
        return [Schedule("flooder.flood", 1.0, flood)]
"""
CONFIGURED = """
    class Section(msgspec.Struct, forbid_unknown_fields=True):
        size: int = 1

    config = Section
"""
MIGRATION = """
def up(migrator, db):
    db.execute_sql("CREATE TABLE migrator_things (id INTEGER PRIMARY KEY)")
    db.execute_sql("CREATE NOTHING")
"""
CALLED = ("exiter", "looper", "sleeper", "wrong", "unawaited", "dying")
"""Their hooks are called, and fail."""
AT_START = {
    "importer": "ModuleNotFoundError: No module named 'nothing_has_this_name'",
    "migrator": "",  # in the engine's words
    "configured": "[plugins.configured]: Object contains unknown field `colour`",
    "twin": "acme-twin and corral-twin both have a plugin twin: uninstall one",
}
"""They do not come up, with the reason."""
ROUTES = {"raiser": "raise ValueError('raiser')", "spinner": "while True:\n        pass", "napper": "time.sleep(300)"}
"""Their routes err; the latter two do not come back."""
ALL = (*CALLED, *AT_START, *ROUTES, "flooder")


def install(folder: PluginFolder, *names: str) -> str:
    """Install these; the `corral.toml` that has them loaded."""
    for name in names:
        folder.add(name, text(name), {"migrations/0001_initial.py": MIGRATION} if name == "migrator" else None)
    if "twin" in names:
        folder.add("twin", text("twin"), distribution="acme-twin", package="acme_twin")
    enabled = ", ".join(f'"{name}"' for name in names)
    return f"[database]\nmigrate_on_start = true\n[plugins]\nenabled = [{enabled}]\n" + (
        '[plugins.configured]\ncolour = "red"\n' * ("configured" in names)
    )


def text(name: str) -> str:
    """The `plugin.py` of one of them."""
    facts = {"name": name, "class": f"{name.capitalize()}Plugin"}
    acts = {
        "exiter": "        raise SystemExit(1)",
        "looper": "        while True:\n            pass",
        "wrong": "        return 'text'",
        "steady": "        counts['gate'] += 1",
    }
    parts = [HEAD % facts]
    if name == "importer":
        parts.append("import nothing_has_this_name\n")
    parts.append({"steady": STEADY, "sleeper": SLEEPS, "flooder": FLOODS}.get(name, ""))
    if name in acts:
        parts.append(GATE % {"act": acts[name]})
    if name == "unawaited":
        parts.append((GATE % {"act": "        await asyncio.sleep(0)"}).replace("def check", "async def check"))
    if name == "steady" or name in ROUTES:
        parts.append(ROUTE % {**facts, "act": ROUTES.get(name, "return dict(counts)")})
    parts.append(SEEN if name == "steady" else "")
    parts.append(BODY % facts)
    parts.append({"dying": DIES, "configured": CONFIGURED}.get(name, ""))
    if name in acts or name == "unawaited":
        parts.append(GATED)
    if name == "steady" or name in ROUTES:
        parts.append(ROUTED)
    parts.append({"steady": STEADY_HOOKS, "sleeper": SLEEPS_HOOKS, "flooder": FLOODS_HOOKS}.get(name, ""))
    return "".join(parts)
