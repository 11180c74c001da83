"""The built-in tools of the reference worker: their definitions and implementations."""

from __future__ import annotations

import abc
import asyncio
import functools
import sys
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta

from corral_plugins.workers.node.tools import sandbox
from corral_plugins.workers.node.tools.workspace import ToolFailed, Workspace

SHELL = "/bin/sh"
DEFAULT_SECONDS, MAX_SECONDS = 60, 600
ToolName = Literal["workspace.read", "workspace.list", "workspace.write", "shell.run", "python.run"]
Path = Annotated[str, Meta(max_length=1024, description="path relative to the workspace, with / as the separator")]
Seconds = Annotated[int, Meta(ge=1, le=MAX_SECONDS, description="time in seconds after which the command is stopped")]


class _AbstractShape(msgspec.StructMeta, abc.ABCMeta):
    """The metaclass of msgspec structs that have abstract methods."""


class BuiltinTool(msgspec.Struct, metaclass=_AbstractShape, kw_only=True, forbid_unknown_fields=True):
    """The base class of tools that run on the worker.

    The fields of a subclass are the arguments of the tool, and its docstring is the description of the tool.
    `idempotent` is true if the tool can safely be run twice.
    """

    name: ClassVar[ToolName]
    title: ClassVar[str]
    risk: ClassVar[Literal["read", "write", "dangerous"]]
    idempotent: ClassVar[bool] = True

    @abc.abstractmethod
    async def run(self, workspace: Workspace, limit: float = MAX_SECONDS) -> Any:
        """Run the tool for at most `limit` seconds and return the result. Raise `ToolFailed` if the tool fails."""

    @classmethod
    @functools.cache
    def arguments_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of the arguments. The result is shared, so callers must not change it."""
        _, components = msgspec.json.schema_components([cls])
        return {**components[cls.__name__], "title": cls.title}

    @classmethod
    def parse_arguments(cls, arguments: Any) -> Self:
        """Convert the arguments of a call. Raise `ToolFailed` if the arguments are invalid."""
        try:
            return msgspec.convert(arguments, cls)
        except msgspec.ValidationError as error:
            raise ToolFailed(f"The arguments are not valid: {error}") from None


class ReadFile(BuiltinTool, kw_only=True, forbid_unknown_fields=True):
    """Read part of a text file in the task's workspace. To continue, set `offset` to the returned `next_offset`."""

    name, title, risk = "workspace.read", "Read a file", "read"

    path: Path
    offset: Annotated[int, Meta(ge=0, le=2**53, description="byte offset at which to start reading")] = 0

    async def run(self, workspace: Workspace, limit: float = MAX_SECONDS) -> Any:
        return await asyncio.to_thread(workspace.read_text, self.path, self.offset)


class ListFolder(BuiltinTool, kw_only=True, forbid_unknown_fields=True):
    """List a folder of the task's workspace."""

    name, title, risk = "workspace.list", "List files", "read"

    path: Path = "."

    async def run(self, workspace: Workspace, limit: float = MAX_SECONDS) -> Any:
        return await asyncio.to_thread(workspace.list_folder, self.path)


class WriteFile(BuiltinTool, kw_only=True, forbid_unknown_fields=True):
    """Create or replace a text file in the task's workspace."""

    name, title, risk = "workspace.write", "Write a file", "write"

    path: Path
    content: Annotated[str, Meta(max_length=1024 * 1024)]

    async def run(self, workspace: Workspace, limit: float = MAX_SECONDS) -> Any:
        return await asyncio.to_thread(workspace.write_text, self.path, self.content)


class RunShell(BuiltinTool, kw_only=True, forbid_unknown_fields=True):
    """Run a command with /bin/sh in the task's workspace. Its processes are stopped when it ends."""

    name, title, risk = "shell.run", "Run a command", "dangerous"
    idempotent = False

    command: Annotated[str, Meta(min_length=1, max_length=32_000)]
    timeout_seconds: Seconds = DEFAULT_SECONDS

    async def run(self, workspace: Workspace, limit: float = MAX_SECONDS) -> Any:
        seconds = min(self.timeout_seconds, limit)
        return await sandbox.run_command([SHELL, "-c", self.command], workspace, seconds)


class RunPython(BuiltinTool, kw_only=True, forbid_unknown_fields=True):
    """Run Python code in the task's workspace and return its printed output. Its processes are stopped when it ends."""

    name, title, risk = "python.run", "Run Python code", "dangerous"
    idempotent = False

    code: Annotated[str, Meta(min_length=1, max_length=32_000)]
    timeout_seconds: Seconds = DEFAULT_SECONDS

    async def run(self, workspace: Workspace, limit: float = MAX_SECONDS) -> Any:
        seconds = min(self.timeout_seconds, limit)
        return await sandbox.run_command([sys.executable, "-I", "-c", self.code], workspace, seconds)


TOOLS: dict[str, type[BuiltinTool]] = {
    tool.name: tool for tool in (ReadFile, ListFolder, WriteFile, RunShell, RunPython)
}


def tool_offers(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the tools in the format that the server expects, `{name, schema, risk}`, sorted by name."""
    return [
        {"name": name, "schema": TOOLS[name].arguments_schema(), "risk": TOOLS[name].risk}
        for name in sorted(set(names))
    ]
