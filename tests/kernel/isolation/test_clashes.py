"""What two plugins want to have alone is refused to both; a built-in one keeps it. The built-in ones are protected."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.kernel.isolation.misbehaving import plugin, routes

from corral.auth.principal import PUBLIC
from corral.cli.doctor import check_installation
from corral.config.model import Config, Plugins
from corral.config.reader import load as load_config
from corral.database.model import Model
from corral.events.event import Event
from corral.http.routes import Routes, Socket, SocketConnection
from corral.jobs.job import Job
from corral.plugin import Metric, Plugin, Setting
from corral.plugins.discovery import Found, discover
from corral.plugins.loading import load
from corral.testing.conformance import check_plugin
from corral.testing.kit import make_kernel
from corral.testing.plugin_folder import PluginFolder
from corral_core.accounts.plugin import AccountsPlugin
from corral_plugins.tasks.api import Tasks


def table(name: str) -> type[Model]:
    meta = type("Meta", (), {"table_name": name})
    return type("Table", (Model,), {"Meta": meta})


class Shown(msgspec.Struct, kw_only=True):
    """Nothing."""


class Happened(Event, kw_only=True):
    """It happened."""

    event = "thing.happened"


def setting(self: Any) -> list[Setting[Any]]:
    return [Setting(name="shared.size", kind=int, default=1, title="Size")]


async def serve(connection: SocketConnection) -> None:
    """A socket."""


CLAIMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "setting shared.size": ({"corral_settings": setting}, {"corral_settings": setting}),
    "event thing.happened": ({"corral_events": lambda self: [Happened]}, {"corral_events": lambda self: [Happened]}),
    "job shared.do": (
        {"corral_jobs": lambda self: [Job("shared.do", lambda: None)]},
        {"corral_jobs": lambda self: [Job("shared.do", lambda: None)]},
    ),
    "socket /shared/live": (
        {"corral_sockets": lambda self: [Socket("/shared/live", serve)]},
        {"corral_sockets": lambda self: [Socket("/shared/live", serve)]},
    ),
    "metric corral_shared": (
        {"corral_metrics": lambda self: [Metric(name="corral_shared", help="Of a test.", collect=dict)]},
        {"corral_metrics": lambda self: [Metric(name="corral_shared", help="Of a test.", collect=dict)]},
    ),
    "table one_two_things": (
        {"corral_models": lambda self: [table("one_two_things")]},
        {"corral_models": lambda self: [table("one_two_things")]},
    ),
}


@pytest.mark.parametrize("what", CLAIMS)
async def test_both_of_two_third_parties_fail(tmp_path: Path, what: str) -> None:
    first, second = CLAIMS[what]
    plugins = [
        plugin("one", **first),
        plugin("one_two", **second),
        plugin("steady", corral_routes=lambda self: [routes("steady")]),
    ]
    async with make_kernel(tmp_path, plugins=plugins) as kit:
        told = {name: (kit.loaded(name).state, kit.loaded(name).reason) for name in ("one", "one_two")}
        assert told == {
            "one": ("failed", f"{what} is also declared by one_two"),
            "one_two": ("failed", f"{what} is also declared by one"),
        }
        assert (await kit.client.get("/steady")).status == 200


async def test_a_built_in_one_keeps_its_paths_whoever_is_asked_first(tmp_path: Path) -> None:
    """`a` and `z` are asked before and after it; another name in a path that it serves would have been its end."""
    of_tasks = Routes("/tasks", tag="Of a test")

    @of_tasks.get("/{name}/beside", needs=PUBLIC)
    def read_beside(name: str) -> Shown:
        """Read what is beside a task."""
        return Shown()

    async def asks(connection: SocketConnection, tasks: Tasks) -> None:
        """A service of a plugin that the manifest does not name."""

    plugins: list[type[Plugin] | str] = [
        "agents",
        "workers",
        "tasks",
        "realtime",
        "audit",
        "security",
        plugin("a", corral_routes=lambda self: [of_tasks]),
        plugin("b", corral_sockets=lambda self: [Socket("/b", asks)]),
        plugin("z", corral_sockets=lambda self: [Socket("/ws", serve)]),
    ]
    async with make_kernel(tmp_path, plugins=plugins) as kit:
        reasons = {item.name: item.reason for item in kit.kernel.plugins if not item.active}
        assert sorted(reasons) == ["a", "b", "z"]
        assert "the parameter {name} is named {id} elsewhere" in str(reasons["a"])
        assert "to requires or wants" in str(reasons["b"])
        assert reasons["z"] == "socket /ws is also declared by realtime"
        assert kit.application.sockets["/ws"].loaded.name == "realtime"


async def test_who_takes_the_name_of_a_built_in_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = PluginFolder(tmp_path / "plugins")
    folder.add("tasks", "raise SystemExit(1)", distribution="Corral-Tasks2", package="corral_tasks2")
    for enabled, state in ((("tasks",), "failed"), ((), "disabled")):
        config = Config(plugins=Plugins(dir=folder.path, enabled=enabled))
        plugins = {item.name: item for item in load(discover(config), config)}
        assert (plugins["tasks"].state, plugins["tasks"].found.built_in) == ("active", True)
        rival = plugins["tasks_of_corral_tasks2"]
        assert (rival.state, rival.found.distribution) == (state, "corral-tasks2")
    assert [getattr(each, "plugin", "") for each in caplog.records] == ["tasks_of_corral_tasks2"]
    overrides = {"plugins.dir": str(folder.path), "plugins.enabled": ["tasks"], "data_dir": str(tmp_path / "looked")}
    config = load_config({}, path=Path(os.devnull), overrides=overrides)
    told = [each.detail for each in check_installation(config) if "tasks" in each.detail]
    reason = "name clash with the built-in plugin tasks: uninstall corral-tasks2"
    assert told == [f"tasks_of_corral_tasks2 is failed: {reason}"]
    async with make_kernel(tmp_path, config={"plugins.dir": str(folder.path), "plugins.enabled": ["tasks"]}) as kit:
        admin = await kit.as_user("admin")
        shown = (await admin.get("/plugins/tasks_of_corral_tasks2")).json()
        assert (shown["state"], shown["reason"], shown["distribution"]) == ("failed", reason, "corral-tasks2")
        assert (await admin.get("/tasks")).status == 200


def test_only_what_corral_brings_along_is_protected() -> None:
    class Bold(Plugin):
        """Thinks it must always run."""

        name = "bold"
        protected = True

    foreign = Found(name="bold", load=lambda: Bold, distribution="corral-bold")
    [loaded] = load([foreign], Config(plugins=Plugins(enabled=("bold",))))
    assert (loaded.state, loaded.protected) == ("failed", False)
    assert "only plugins in Corral's own distribution may be protected" in (loaded.reason or "")


def test_a_protected_plugin_cannot_be_disabled_by_the_file() -> None:
    core = Found(name="accounts", load=lambda: AccountsPlugin, module=AccountsPlugin.__module__)
    [loaded] = load([core], Config(plugins=Plugins(disabled=("accounts",))))
    assert (loaded.state, loaded.protected) == ("active", True)


def test_safe_mode_loads_protected_plugins_only() -> None:
    found = [
        Found(name="accounts", load=lambda: AccountsPlugin, module=AccountsPlugin.__module__),
        Found(name="other", load=lambda: pytest.fail("it was loaded")),
    ]
    states = {item.name: (item.state, item.reason) for item in load(found, Config(safe_mode=True))}
    assert states == {"accounts": ("active", None), "other": ("disabled", "safe mode")}


PEOPLE = '''
from corral_core.accounts.api import Accounts
from corral.plugin import Plugin


class PeoplePlugin(Plugin):
    """Knows that there are accounts."""

    name = "people"
    kind = Accounts
'''


def test_the_api_of_core_is_public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    PluginFolder(tmp_path).add("people", PEOPLE)
    from corral_people.plugin import PeoplePlugin  # type: ignore[import-not-found]  # just written

    try:
        check_plugin(PeoplePlugin)
    finally:
        for name in [each for each in sys.modules if each.startswith("corral_people")]:
            del sys.modules[name]
