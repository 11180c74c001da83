"""The tools of the reference worker by name: what is told of them to the server, and what runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from corral_plugins.workers.node.tools import programs
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspace

SHELL = "/bin/sh"
SECONDS = 60
Path = Annotated[str, Meta(max_length=1024, description="relative to the workspace, with /")]
Seconds = Annotated[int, Meta(ge=1, le=600, description="the command is ended after so many seconds")]


class Arguments(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what tools take."""


class ReadFile(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Read a text file of the task's workspace, a part at a time; go on at `next_offset`."""

    path: Path
    offset: Annotated[int, Meta(ge=0, le=2**53, description="in bytes")] = 0


class WriteFile(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Make or replace a text file in the task's workspace."""

    path: Path
    content: Annotated[str, Meta(max_length=1024 * 1024)]


class ListFolder(Arguments, kw_only=True, forbid_unknown_fields=True):
    """List a folder of the task's workspace."""

    path: Path = "."


class RunShell(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Run a command with /bin/sh in the task's workspace. All that it started ends with it."""

    command: Annotated[str, Meta(min_length=1, max_length=32_000)]
    timeout_seconds: Seconds = SECONDS


class RunPython(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Run Python code in the task's workspace; print what is to be seen. All that it started ends with it."""

    code: Annotated[str, Meta(min_length=1, max_length=32_000)]
    timeout_seconds: Seconds = SECONDS


class WorkerTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that runs here. `repeatable`: running it twice does no harm."""

    name: str
    title: str
    risk: Literal["read", "write", "dangerous"]
    arguments: type[Arguments]
    run: Callable[[Workspace, Any], Awaitable[Any]]
    repeatable: bool

    @property
    def description(self) -> str:
        """For the model and for people."""
        return str(self.arguments.__doc__)

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the arguments."""
        _, components = msgspec.json.schema_components([self.arguments])
        return {**components[self.arguments.__name__], "title": self.title}

    async def call(self, workspace: Workspace, given: Any) -> Any:
        """Run it. Raises `ToolFailed`, also for arguments that it does not take."""
        try:
            arguments = msgspec.convert(given, self.arguments)
        except msgspec.ValidationError as error:
            raise ToolFailed(f"The arguments do not fit: {error}") from None
        return await self.run(workspace, arguments)


async def _read(workspace: Workspace, given: ReadFile) -> Any:
    return await asyncio.to_thread(workspace.read, given.path, given.offset)


async def _write(workspace: Workspace, given: WriteFile) -> Any:
    return await asyncio.to_thread(workspace.write, given.path, given.content)


async def _list(workspace: Workspace, given: ListFolder) -> Any:
    return await asyncio.to_thread(workspace.list, given.path)


async def _shell(workspace: Workspace, given: RunShell) -> Any:
    return await programs.run([SHELL, "-c", given.command], workspace, given.timeout_seconds)


async def _python(workspace: Workspace, given: RunPython) -> Any:
    return await programs.run([sys.executable, "-I", "-c", given.code], workspace, given.timeout_seconds)


TOOLS = {
    tool.name: tool
    for tool in (
        WorkerTool(
            name="workspace.read", title="Read a file", risk="read", arguments=ReadFile, run=_read, repeatable=True
        ),
        WorkerTool(
            name="workspace.list", title="List files", risk="read", arguments=ListFolder, run=_list, repeatable=True
        ),
        WorkerTool(
            name="workspace.write",
            title="Write a file",
            risk="write",
            arguments=WriteFile,
            run=_write,
            repeatable=True,
        ),
        WorkerTool(
            name="shell.run", title="Run a command", risk="dangerous", arguments=RunShell, run=_shell, repeatable=False
        ),
        WorkerTool(
            name="python.run",
            title="Run Python code",
            risk="dangerous",
            arguments=RunPython,
            run=_python,
            repeatable=False,
        ),
    )
}


def offers(names: Iterable[str]) -> list[dict[str, Any]]:
    """What a worker that allows these tells its server: `{name, schema, risk}`, by name."""
    return [{"name": name, "schema": TOOLS[name].schema, "risk": TOOLS[name].risk} for name in sorted(set(names))]
