"""A built-in plugin that did not come up answers 503 on its own paths, without being loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.shared_kernels import on_the_loop_of_the_module

from corral.plugins.discovery import Found, discover
from corral.testing.kit import Kit, make_kernel
from corral.testing.plugin_folder import PluginFolder
from corral_plugins.tasks.plugin import TasksPlugin

SQUAT = '''
from corral.auth.principal import PUBLIC
from corral.http.routes import Routes
from corral.plugin import Plugin, hookimpl

routes = Routes("/squat", tag="Squat")


@routes.get("/", needs=PUBLIC)
def read_it() -> dict[str, str]:
    """Answer."""
    return {"squat": "yes"}


class SquatPlugin(Plugin):
    """A third party's."""

    name = "squat"

    @hookimpl
    def corral_routes(self):
        return [routes]
'''


ID = "01890a5d-ac96-774b-bcce-b302099a8057"  # nobody's; fixed, so that every process collects the same tests


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def without_tasks(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kit]:
    """All built-in plugins but `tasks` and what requires it."""
    async with make_kernel(tmp_path_factory.mktemp("kernel"), config={"plugins.disabled": ["tasks"]}) as kit:
        yield kit


def check_closed(answer: Any, code: str = "plugin_disabled") -> None:
    assert (answer.status, answer.code) == (503, code)
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", ["/tasks", "/tasks/", f"/tasks/{ID}", f"/tasks/{ID}/", "/tasks/stats"])
@on_the_loop_of_the_module
async def test_reads_of_a_disabled_builtin_are_503(without_tasks: Kit, path: str) -> None:
    assert without_tasks.loaded("tasks").plugin is None  # it was not loaded
    answer = await without_tasks.client.get(path)
    check_closed(answer)
    assert answer.json()["detail"] == (
        "The plugin tasks is disabled: config. Ask an admin to enable it: corral plugins enable tasks"
    )
    head = await without_tasks.client.request("HEAD", path)
    assert (head.status, head.body) == (503, b"")


@pytest.mark.parametrize("path", ["/tasks", "/tasks/", f"/tasks/{ID}/cancel", f"/tasks/{ID}/cancel/"])
@on_the_loop_of_the_module
async def test_writes_of_a_disabled_builtin_are_503(without_tasks: Kit, path: str) -> None:
    check_closed(await without_tasks.client.post(path, {"title": "x"}))
    member = await without_tasks.as_user("member")
    check_closed(await member.post(path))


@pytest.mark.parametrize("path", ["/tasks/no-id", "/tasks/stats/more", f"/tasks/{ID}/nothing", "/nothing"])
@on_the_loop_of_the_module
async def test_unknown_paths_are_404_as_ever(without_tasks: Kit, path: str) -> None:
    assert (await without_tasks.client.get(path)).status == 404


@on_the_loop_of_the_module
async def test_a_wrong_method_is_405_as_ever(without_tasks: Kit) -> None:
    answer = await without_tasks.client.put("/tasks")
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert (await without_tasks.client.request("OPTIONS", "/tasks")).status == 204


@on_the_loop_of_the_module
async def test_the_document_lists_only_what_is_served(without_tasks: Kit) -> None:
    paths = (await without_tasks.client.get("/openapi.json")).json()["paths"]
    served = [path for path, item in paths.items() if any("Tasks" in operation["tags"] for operation in item.values())]
    assert served == []
    assert "/api/v1/tasks" not in paths
    assert "/api/v1/agents" in paths


async def test_a_blocked_builtin_is_disabled_for_clients(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, config={"plugins.disabled": ["agents"]}) as kit:
        assert kit.loaded("tasks").state == "blocked"
        answer = await kit.client.get("/tasks")
        check_closed(answer)
        assert answer.json()["detail"] == (
            "The plugin tasks is blocked: requires agents, which is disabled. Ask an admin to look at it: "
            "corral plugins show tasks"
        )


async def test_a_builtin_that_fails_at_import_is_told_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(found: Found) -> Any:
        raise ImportError("no such library")

    def broken(config: Any) -> list[Found]:
        return [
            Found(name=item.name, load=lambda item=item: load(item), module=item.module)  # type: ignore[misc]  # bound
            if item.name == "tasks"
            else item
            for item in discover(config)
        ]

    monkeypatch.setattr("corral.testing.booting.discover", broken)
    async with make_kernel(tmp_path) as kit:
        answer = await kit.client.get("/tasks")
        check_closed(answer, "plugin_failed")
        assert answer.json()["detail"] == (
            "The plugin tasks is failed: ImportError: no such library. Ask an admin to look at it: "
            "corral plugins show tasks"
        )


async def test_one_that_fails_while_wired_is_told_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next kernel of this process has the plugin again, and its tables."""

    def fail(self: Any) -> Any:
        raise OSError("no luck")

    folders = [tmp_path / name for name in ("plugins", "broken", "whole")]
    for folder in folders:
        folder.mkdir()
    config = {"plugins.dir": str(folders[0])}  # no other test loads its plugins with this configuration
    with monkeypatch.context() as patch:
        patch.setattr(TasksPlugin, "__init__", fail)
        async with make_kernel(folders[1], config=config) as kit:
            check_closed(await kit.client.post("/tasks"), "plugin_failed")
    async with make_kernel(folders[2], config=config) as kit:
        member = await kit.as_user()
        assert (await member.get("/tasks")).status == 200


async def test_a_third_party_plugin_that_is_not_loaded_is_404(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = PluginFolder(tmp_path / "plugins")
    folder.add("squat", SQUAT, {"paths.json": '{"squat": ["GET /squat"]}'})
    for more in ({}, {"plugins.disabled": ["squat"]}):
        async with make_kernel(tmp_path, config={"plugins.dir": str(folder.path), **more}) as kit:
            assert kit.loaded("squat").state == "disabled"
            assert (await kit.client.get("/squat")).status == 404


async def test_what_is_not_installed_is_404(tmp_path: Path) -> None:
    async with make_kernel(tmp_path, plugins=[]) as kit:
        assert (await kit.client.get("/tasks")).status == 404


async def test_another_plugin_may_serve_the_paths_of_a_disabled_builtin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = PluginFolder(tmp_path / "plugins")
    folder.add("squat", SQUAT.replace('"/squat"', '"/tasks"').replace('"/", ', '"/one", '))
    config = {"plugins.dir": str(folder.path), "plugins.enabled": ["squat"], "plugins.disabled": ["tasks"]}
    async with make_kernel(tmp_path, config=config) as kit:
        assert (await kit.client.get("/tasks/one")).json() == {"squat": "yes"}
        check_closed(await kit.client.get("/tasks"))


PROBE = """
import sys
from corral.config.model import Config, Plugins
from corral.asgi.unavailable import built_in_operations
from corral.plugins.discovery import discover
from corral.plugins.loading import load
found = [item for item in discover(Config()) if item.name == "tasks"]
loaded = load(found, Config(plugins=Plugins(disabled=("tasks",))))
assert "GET /tasks" in built_in_operations(loaded)["tasks"]
assert not [name for name in sys.modules if name.startswith("corral_plugins.tasks.")]
"""


def test_the_paths_are_known_without_importing_a_plugin() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
