"""The HTTP routes for files."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from corral.auth.principal import PUBLIC, SIGNED_IN, Principal
from corral.database.engine import Work
from corral.errors import Invalid
from corral.http.answers import Answer, IfMatch, Request, Stream
from corral.http.idempotency import IdempotencyKey
from corral.http.page import Page
from corral.http.routes import MIB, Routes
from corral.plugin import Settings
from corral_plugins.files.api import FileSource, FileVisibility
from corral_plugins.files.service.downloads import Downloads
from corral_plugins.files.service.links import FileLinks, convert_to_forbidden
from corral_plugins.files.service.multipart_body import OTHER_PARTS_BYTES, UploadBody
from corral_plugins.files.service.quota import FileQuota
from corral_plugins.files.service.registry import FileRegistry, future_instant, lease_lost_error, view_of
from corral_plugins.files.service.storage import FileStorage
from corral_plugins.files.service.uploads import NewFile, Uploads, refuse_larger
from corral_plugins.files.settings import ARTIFACT_VISIBILITY, MAX_BYTES, MAX_UPLOAD_BYTES
from corral_plugins.files.shapes import (
    FileLink,
    FilePatch,
    FileQuery,
    FileUpload,
    FileUsage,
    FileView,
    LinkQuery,
    UploadQuery,
)

READ, WRITE = "files.read", "files.write"
UPLOAD_SECONDS = 86_400.0  # an upload ends when no bytes arrive for `CORRAL_BODY_TIMEOUT`, not before
DAMAGED = ("dependency_unavailable",)
MACHINES = ("worker", "agent")

routes = Routes("/files", tag="Files", explain=convert_to_forbidden)


@routes.get("/", needs=READ, delegable=True)
def list_files(query: FileQuery, registry: FileRegistry, caller: Principal) -> Page[FileView]:
    """List the files that you may read, newest first: your own files, and files that other users shared with a task."""
    return registry.list_files(query, caller)


@routes.post(
    "/upload",
    needs=WRITE,
    status=201,
    also=(200,),
    multipart=FileUpload,
    body_limit=MAX_BYTES + MIB,
    seconds=UPLOAD_SECONDS,
    delegable=True,
    raises=("malformed_multipart", "blocked_file_type", "unknown_reference", "quota_exceeded", "lease_lost"),
)
async def upload_file(
    body: AsyncIterator[bytes],
    query: UploadQuery,
    uploads: Uploads,
    settings: Settings,
    caller: Principal,
    request: Request,
) -> Answer[FileView]:
    """Upload a file as the part `file` of a multipart/form-data body. The file is stored completely or not at all.

    Workers and agents upload files for the task whose lease they hold. Their uploads are refused if the file contains
    the value of a stored secret.
    """
    upload = UploadBody(request, body)
    new = _new_file(query, caller, request, settings)
    await upload.begin()
    # Text parts may follow the file. Only then can its size be less than it seems.
    refuse_larger(None if upload.size is None else upload.size - OTHER_PARTS_BYTES, settings.get(MAX_UPLOAD_BYTES))
    new.name, new.content_type, new.size = upload.name, upload.content_type, upload.size

    async def chunks() -> AsyncIterator[bytes]:
        async for chunk in upload.file_chunks():
            yield chunk
        _apply_fields(new, upload)

    _apply_fields(new, upload)
    row, is_new = await uploads.store(new, chunks(), entry=request.unit_context(caller))
    headers = {"ETag": f'"{row.version}"', "Location": f"/api/v1/files/{row.id}"}
    if not is_new:
        headers["Idempotency-Replayed"] = "true"
    return Answer(body=view_of(row), status=201, headers=headers)


def _new_file(query: UploadQuery, caller: Principal, request: Request, settings: Settings) -> NewFile:
    """Return the properties of the uploaded file that are known before the request body is read."""
    task_id = query.task_id.lower() if isinstance(query.task_id, str) else None
    visibility: FileVisibility = "private"
    lease = None
    if caller.kind in MACHINES:
        if caller.lease_id is None or caller.task_id is None or task_id != caller.task_id:
            raise lease_lost_error()
        lease = caller.task_id, caller.lease_id
        visibility = "task" if settings.get(ARTIFACT_VISIBILITY) == "task" else "private"
    given = request.header("idempotency-key")
    key = None
    if given is not None:
        scope = f"{caller.kind}:{caller.task_id or caller.id}\0{task_id}"
        key = IdempotencyKey.of_request(given, scope, "POST", "/files/upload", b"").scope_hash
    source = FileSource(type="user", id=caller.user_id)
    if lease is not None:  # a worker names its lease in a header; an attempt token carries it
        by_worker = request.header("corral-lease") is not None
        source = FileSource(type="worker" if by_worker else "agent", id=caller.agent_id)
    return NewFile(
        name="",
        owner_id=caller.user_id or "",
        source=source,
        task_id=task_id,
        visibility=visibility,
        lease=lease,
        upload_key=key,
    )


def _apply_fields(new: NewFile, upload: UploadBody) -> None:
    """Apply the text parts of the upload, such as the name, to `new`."""
    fields = upload.fields
    if isinstance(fields.name, str):
        new.name = fields.name
    if not isinstance(fields.visibility, msgspec.UnsetType):
        new.visibility = fields.visibility
    if new.visibility == "task" and new.task_id is None:
        raise Invalid.at(
            "/visibility", "not_allowed", "The file does not belong to a task; choose a task with ?task_id=."
        )
    if new.expires_at is None:
        new.expires_at = future_instant(fields.expires_at, "/expires_at")


@routes.get("/usage", needs=SIGNED_IN)
def get_file_usage(quota: FileQuota, caller: Principal) -> FileUsage:
    """Return the number of your files, the bytes that they occupy, and your quota."""
    return quota.usage(caller.user_id or "")


@routes.get("/{id}", needs=READ, delegable=True)
def get_file(id: str, registry: FileRegistry, caller: Principal) -> FileView:
    """Get a file's metadata, without its content."""
    return view_of(registry.find(id, caller))


@routes.get(
    "/{id}/download",
    needs=READ,
    also=(206,),
    seconds=UPLOAD_SECONDS,
    delegable=True,
    raises=("range_not_satisfiable",),
)
async def download_file(
    id: str, registry: FileRegistry, downloads: Downloads, caller: Principal, request: Request, work: Work
) -> Stream:
    """Download a file, or a range of it. The `ETag` is the SHA-256 hash of the whole file."""
    row = await work(lambda: registry.find(id, caller), read=True)
    return await downloads.respond(row, request)


@routes.get("/{id}/url", needs=READ, delegable=True, no_store=True, raises=("vault_sealed",))
async def create_file_link(
    id: str, registry: FileRegistry, links: FileLinks, caller: Principal, request: Request, work: Work
) -> FileLink:
    """Create a link for downloading the file without a login. The link is valid for an hour.

    The audit log records the creation of the link.
    """
    row = await work(lambda: registry.find(id, caller), read=True)
    link = await links.make(row)
    await work(lambda: registry.record_link(row), entry=request.unit_context(caller))
    return link


@routes.get(
    "/{id}/content",
    needs=PUBLIC,
    also=(206,),
    seconds=UPLOAD_SECONDS,
    raises=("invalid_signature", "link_expired", "range_not_satisfiable", "vault_sealed"),
)
async def open_file_link(
    id: str, query: LinkQuery, links: FileLinks, downloads: Downloads, request: Request, work: Work
) -> Stream:
    """Download a file with a link. Anyone who has the link may download the file without a login or API key."""
    row = await work(lambda: links.open(id, query), read=True)
    return await downloads.respond(row, request)


@routes.patch(
    "/{id}", needs=WRITE, raises=("not_found", "forbidden", "precondition_failed", "unknown_reference", "invalid_state")
)
def update_file(id: str, body: FilePatch, match: IfMatch, registry: FileRegistry, caller: Principal) -> FileView:
    """Change the name, the task, the visibility or the expiry of a file. Absent fields stay unchanged.

    If the visibility is `task`, everyone who may read the task may also read and download the file. A file without a
    task is private.
    """
    return registry.update(id, body, match, caller)


@routes.delete("/{id}", needs=WRITE, raises=("not_found", "forbidden", "precondition_failed", "in_use"))
async def delete_file(
    id: str,
    match: IfMatch,
    registry: FileRegistry,
    storage: FileStorage,
    caller: Principal,
    request: Request,
    work: Work,
) -> None:
    """Delete a file and its content. Its links stop working."""
    key = await work(lambda: registry.delete(id, match, caller), entry=request.unit_context(caller))
    await storage.discard(key)
