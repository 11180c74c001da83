"""The audit entries of tools, if there is an audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tests.plugins.tools.conftest import World

from corral.http.routes import Route
from corral.plugin import Audit, AuditEntry, Plugin, Provide, hookimpl


class Notebook:
    """Implements `Audit`."""

    verbose = False

    def __init__(self) -> None:
        self.entries: list[AuditEntry] = []

    def record(self, entry: AuditEntry) -> None:
        self.entries.append(entry)

    def record_request(self, route: Route, path: str, status: int, code: str | None) -> None:
        raise AssertionError("only a verbose log is told of every request")


def _audit(notebook: Notebook) -> Audit:
    return notebook


class NotebookPlugin(Plugin):
    """Keeps entries in memory."""

    name = "audit"

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [Provide(Notebook, Notebook), Provide(Audit, _audit)]


async def test_denials_of_external_tools_and_changes_are_recorded(make_kit: Callable[..., Any]) -> None:
    world = await World().build(make_kit, more=(NotebookPlugin,))
    entries = world.kit.kernel.container.get(Notebook).entries
    entries.clear()
    run = await world.run("test.read")
    for tool in ("test.write", "test.page", "test.danger", "no.such"):
        await run.say(tool)
    assert [(entry.action, entry.object_id) for entry in entries] == [
        ("tools.call.run", "test.page"),
        ("tools.call.run", "test.danger"),
    ]
    assert (entries[0].outcome, entries[0].code) == ("denied", "tools.denied")
    assert entries[0].details["reason"] == "not_enabled"
    await world.admin.patch("/tools/test.page", {"enabled": False})
    assert (entries[-1].action, entries[-1].changes) == ("tools.tool.update", {"enabled": (True, False)})
