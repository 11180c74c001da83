"""The tools that agents use to list, read and write files."""

from __future__ import annotations

from collections.abc import AsyncIterator

from corral.database.unit import UnitContext
from corral.errors import NotFound
from corral_plugins.files.api import FileSource
from corral_plugins.files.models import File
from corral_plugins.files.service.downloads import ByteRange, Downloads
from corral_plugins.files.service.registry import FileRegistry, view_of
from corral_plugins.files.service.uploads import NewFile, Uploads
from corral_plugins.files.settings import ARTIFACT_VISIBILITY
from corral_plugins.files.shapes import FileQuery
from corral_plugins.tools.api import Json, Tool, ToolContext, ToolFailure, ToolOutput, ToolSet

READ_BYTES = 48 * 1024  # of text in one call; the result of a tool may have 64 KiB
WRITE_CHARACTERS = 256 * 1024
SHOWN = ("id", "name", "size_bytes", "detected_type", "task_id", "created_at")
ID = {"type": "string", "format": "uuid"}

LIST_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "task_id": {
            **ID,
            "description": "The task whose files are listed. Without a task, all readable files are listed.",
        },
        "search": {
            "type": "string",
            "minLength": 1,
            "maxLength": 200,
            "description": "Text that the name of the file contains.",
        },
        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
    },
    "additionalProperties": False,
}
READ_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "file_id": {**ID, "description": "The file to read."},
        "offset": {
            "type": "integer",
            "minimum": 0,
            "description": "The byte at which to begin, from next_offset of the previous result.",
        },
    },
    "required": ["file_id"],
    "additionalProperties": False,
}
WRITE_SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 255, "description": "The name of the new file."},
        "content": {"type": "string", "maxLength": WRITE_CHARACTERS, "description": "The text of the file."},
    },
    "required": ["name", "content"],
    "additionalProperties": False,
}


class AgentFiles:
    """Implements the file tools. An agent may read the files that the requester of its task may read."""

    def __init__(self, registry: FileRegistry, downloads: Downloads, uploads: Uploads) -> None:
        self._registry, self._downloads, self._uploads = registry, downloads, uploads

    def list_files(self, context: ToolContext, arguments: Json) -> Json:
        """Return the files that the agent may read, newest first. Runs in the unit of work of the tool call."""
        filters: Json = {name: arguments[name] for name in ("task_id", "search") if name in arguments}
        query = FileQuery(limit=arguments.get("limit", 20), **filters)
        page = self._registry.list_files(query, context.caller)
        items = [{name: getattr(file, name) for name in SHOWN} for file in page.items]
        return {"files": items, "total": page.total}

    async def read_file(self, context: ToolContext, arguments: Json) -> ToolOutput:
        """Read part of a text file. The content is untrusted unless the task's requester uploaded the file."""
        row = await context.work(lambda: self._find(context, arguments["file_id"]), read=True)
        if not row.detected_type.startswith("text/") and row.detected_type not in ("image/svg+xml", "application/xml"):
            raise ToolFailure("not_text", f"The file is of the type {row.detected_type}; only text can be read.")
        start = int(arguments.get("offset", 0))
        text, end = await self._text(row, start)
        value: Json = {**{name: getattr(row, name) for name in SHOWN}, "text": text}
        if end < row.size_bytes:
            value["next_offset"] = end
        view = view_of(row)
        is_own = view.source.type == "user" and row.owner_id == context.caller.user_id
        return ToolOutput(value=value, untrusted=() if is_own else (f"file:{row.id}",))

    async def write_file(self, context: ToolContext, arguments: Json) -> Json:
        """Store text as a new file that belongs to the task."""
        caller = context.caller
        visibility = self._uploads.settings.get(ARTIFACT_VISIBILITY)
        new = NewFile(
            name=arguments["name"],
            owner_id=caller.user_id or "",
            source=FileSource(type="agent", id=caller.agent_id),
            task_id=context.task_id,
            visibility="task" if visibility == "task" else "private",
            content_type="text/plain",
            lease=(context.task_id, context.lease_id),
        )
        entry = UnitContext(label="tool files.write", actor=caller.actor)
        row, _ = await self._uploads.store(new, _single_chunk(arguments["content"].encode()), entry=entry)
        return {"file_id": row.id, "name": row.name, "size_bytes": row.size_bytes}

    def is_visible(self, context: ToolContext, arguments: Json) -> bool:
        """Return whether the task's requester may read the file that the tool call's arguments refer to."""
        try:
            self._find(context, arguments["file_id"])
        except NotFound:
            return False
        return True

    def _find(self, context: ToolContext, file_id: str) -> File:
        return self._registry.find(file_id.lower(), context.caller)

    async def _text(self, row: File, start: int) -> tuple[str, int]:
        """Decode the text that begins at the byte position `start`.

        Return the text, and the byte position after its last complete character.
        """
        part = ByteRange(min(start, row.size_bytes), min(start + READ_BYTES, row.size_bytes))
        is_whole = part == ByteRange(0, row.size_bytes)
        chunks = await (self._downloads.checked_chunks(row) if is_whole else self._downloads.range_chunks(row, part))
        kept = b"".join([chunk async for chunk in chunks])
        text = kept.decode("utf-8", "ignore")
        return text, start + (len(kept) if len(kept) < READ_BYTES else len(text.encode()))


class FileTools(ToolSet[AgentFiles]):
    """The tools that the `files` plugin contributes."""

    def all(self) -> list[Tool]:
        """Return all file tools."""

        async def read(context: ToolContext, arguments: Json) -> ToolOutput:
            return await self.implementation.read_file(context, arguments)

        async def write(context: ToolContext, arguments: Json) -> Json:
            return await self.implementation.write_file(context, arguments)

        return [
            Tool(
                name="files.list",
                title="List files",
                description="List the files that you may read, newest first.",
                risk="read",
                schema=LIST_SCHEMA,
                permission="files.read",
                idempotent=True,
                run=lambda context, arguments: self.implementation.list_files(context, arguments),
            ),
            Tool(
                name="files.read",
                title="Read a file",
                description="Read the text of a file. To read a long file in parts, pass the returned next_offset "
                "as offset.",
                risk="read",
                schema=READ_SCHEMA,
                permission="files.read",
                idempotent=True,
                is_visible=lambda context, arguments: self.implementation.is_visible(context, arguments),
                run=read,
            ),
            Tool(
                name="files.write",
                title="Write a file",
                description="Store text as a new file, which becomes an artifact of the task.",
                risk="write",
                schema=WRITE_SCHEMA,
                permission="files.write",
                run=write,
            ),
        ]


async def _single_chunk(content: bytes) -> AsyncIterator[bytes]:
    yield content
