"""The built-in tools of the reference worker: their definitions and implementations."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from corral_plugins.workers.node.tools import sandbox
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspace

SHELL = "/bin/sh"
DEFAULT_SECONDS = 60
ToolName = Literal["workspace.read", "workspace.list", "workspace.write", "shell.run", "python.run"]
Path = Annotated[str, Meta(max_length=1024, description="relative to the workspace, separated by /")]
Seconds = Annotated[int, Meta(ge=1, le=600, description="the command is stopped after this many seconds")]


class Arguments(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the tools' arguments. The docstring of a subclass is the description of the tool."""


class ReadFile(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Read a text file of the task's workspace, one part at a time; continue at `next_offset`."""

    path: Path
    offset: Annotated[int, Meta(ge=0, le=2**53, description="in bytes")] = 0


class WriteFile(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Create or replace a text file in the task's workspace."""

    path: Path
    content: Annotated[str, Meta(max_length=1024 * 1024)]


class ListFolder(Arguments, kw_only=True, forbid_unknown_fields=True):
    """List a folder of the task's workspace."""

    path: Path = "."


class RunShell(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Run a command with /bin/sh in the task's workspace. Every process that it starts ends with it."""

    command: Annotated[str, Meta(min_length=1, max_length=32_000)]
    timeout_seconds: Seconds = DEFAULT_SECONDS


class RunPython(Arguments, kw_only=True, forbid_unknown_fields=True):
    """Run Python code in the task's workspace; print the results. Every process that it starts ends with it."""

    code: Annotated[str, Meta(min_length=1, max_length=32_000)]
    timeout_seconds: Seconds = DEFAULT_SECONDS


class BuiltinTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that runs on the worker. `idempotent`: running it twice is harmless."""

    name: ToolName
    title: str
    risk: Literal["read", "write", "dangerous"]
    arguments: type[Arguments]
    run: Callable[[Workspace, Any], Awaitable[Any]]
    idempotent: bool

    @property
    def description(self) -> str:
        """The description for the model and for people."""
        return str(self.arguments.__doc__)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the arguments."""
        _, components = msgspec.json.schema_components([self.arguments])
        return {**components[self.arguments.__name__], "title": self.title}

    async def call(self, workspace: Workspace, given: Any) -> Any:
        """Run the tool. Raises `ToolFailed`, also for invalid arguments."""
        try:
            arguments = msgspec.convert(given, self.arguments)
        except msgspec.ValidationError as error:
            raise ToolFailed(f"The arguments are not valid: {error}") from None
        return await self.run(workspace, arguments)


async def _read(workspace: Workspace, given: ReadFile) -> Any:
    return await asyncio.to_thread(workspace.read, given.path, given.offset)


async def _write(workspace: Workspace, given: WriteFile) -> Any:
    return await asyncio.to_thread(workspace.write, given.path, given.content)


async def _list(workspace: Workspace, given: ListFolder) -> Any:
    return await asyncio.to_thread(workspace.list, given.path)


async def _shell(workspace: Workspace, given: RunShell) -> Any:
    return await sandbox.run([SHELL, "-c", given.command], workspace, given.timeout_seconds)


async def _python(workspace: Workspace, given: RunPython) -> Any:
    return await sandbox.run([sys.executable, "-I", "-c", given.code], workspace, given.timeout_seconds)


TOOLS: dict[str, BuiltinTool] = {
    tool.name: tool
    for tool in (
        BuiltinTool(
            name="workspace.read", title="Read a file", risk="read", arguments=ReadFile, run=_read, idempotent=True
        ),
        BuiltinTool(
            name="workspace.list", title="List files", risk="read", arguments=ListFolder, run=_list, idempotent=True
        ),
        BuiltinTool(
            name="workspace.write",
            title="Write a file",
            risk="write",
            arguments=WriteFile,
            run=_write,
            idempotent=True,
        ),
        BuiltinTool(
            name="shell.run", title="Run a command", risk="dangerous", arguments=RunShell, run=_shell, idempotent=False
        ),
        BuiltinTool(
            name="python.run",
            title="Run Python code",
            risk="dangerous",
            arguments=RunPython,
            run=_python,
            idempotent=False,
        ),
    )
}


def tool_offers(names: Iterable[str]) -> list[dict[str, Any]]:
    """The tools as a worker reports them to the server: `{name, schema, risk}`, sorted by name."""
    return [{"name": name, "schema": TOOLS[name].schema, "risk": TOOLS[name].risk} for name in sorted(set(names))]
