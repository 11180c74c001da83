"""The routes under `/admin/audit`, which list, verify and export the audit log.

Every use of these routes is itself recorded in the log.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.leases import acquire_lease, release_lease
from corral.errors import Conflict
from corral.http.answers import Request, Stream
from corral.http.page import Page, PageQuery
from corral.http.routes import Routes
from corral.ids import new_id
from corral_plugins.audit.service.export import MEDIA, LogExport
from corral_plugins.audit.service.log import AccessRecorder
from corral_plugins.audit.service.queries import AuditQueries
from corral_plugins.audit.service.verify import SECONDS, Verification
from corral_plugins.audit.shapes import (
    AuditQuery,
    AuditView,
    CheckpointPage,
    ExportQuery,
    VerificationResult,
    VerifyQuery,
)

routes = Routes("/admin/audit", tag="Audit", no_store=True)

READ, EXPORT = "audit.read", "audit.export"


@routes.get("/", needs=READ, raises=("invalid_cursor",))
async def list_audit_rows(
    query: AuditQuery, caller: Principal, request: Request, queries: AuditQueries, access: AccessRecorder, work: Work
) -> Page[AuditView]:
    """List the rows of the audit log, newest first. `action` accepts a prefix such as `auth.*`."""
    page = await work(lambda: queries.list_rows(query, caller), read=True)
    await access.record_access("read", request.unit_context(caller), filters=_filters_of(query))
    return page


@routes.get("/verify", needs=READ, raises=("batch_in_progress",), seconds=SECONDS + 5, live=True)
async def verify_audit_log(
    query: VerifyQuery,
    caller: Principal,
    request: Request,
    verification: Verification,
    access: AccessRecorder,
    work: Work,
) -> VerificationResult:
    """Verify that no row was altered or removed. Only one verification runs at a time."""
    holder = new_id()
    if not await work(lambda: acquire_lease("audit.verify", holder, SECONDS + 5)):
        raise Conflict(
            "Another verification of the audit log is running; wait until that verification has finished.",
            code="batch_in_progress",
        )
    try:
        from_seq, to_seq = (None if value is UNSET else value for value in (query.from_seq, query.to_seq))
        verdict = await verification.run(from_seq, to_seq)
    finally:
        await asyncio.shield(work(lambda: release_lease("audit.verify", holder)))
    found: dict[str, Any] = {"ok": verdict.ok, "checked": verdict.checked, "first_bad_seq": verdict.first_bad_seq}
    await access.record_access("verify", request.unit_context(caller), **found)
    return verdict


@routes.get("/export", needs=EXPORT, raises=("unsupported_format",))
async def export_audit_log(
    query: ExportQuery, caller: Principal, request: Request, access: AccessRecorder, work: Work
) -> Stream:
    """Stream the log, oldest row first, as JSON lines that can be verified offline, or as CSV."""
    export = LogExport(work, query)
    await access.record_access("export", request.unit_context(caller), format=query.format, filters=_filters_of(query))
    stamp = clock.now()[:19].replace("-", "").replace(":", "").replace("T", "-")
    name = f"corral-audit-{stamp}.{query.format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Stream(export.chunks(), media_type=MEDIA[query.format], headers=headers)


@routes.get("/checkpoints", needs=READ, raises=("invalid_cursor",))
async def list_audit_checkpoints(
    query: PageQuery, caller: Principal, request: Request, queries: AuditQueries, access: AccessRecorder, work: Work
) -> CheckpointPage:
    """List the checkpoints, newest first, with the public key for verifying them.

    To be able to detect the removal of the newest rows, keep a copy of the checkpoints on another system.
    """
    page = await work(lambda: queries.list_checkpoints(query, caller), read=True)
    await access.record_access("read", request.unit_context(caller), what="checkpoints")
    return page


@routes.get("/{id}", needs=READ, raises=("not_found",))
async def get_audit_row(
    id: str, caller: Principal, request: Request, queries: AuditQueries, access: AccessRecorder, work: Work
) -> AuditView:
    """Return a row of the audit log."""
    row = await work(lambda: queries.get_row(id), read=True)
    await access.record_access("read", request.unit_context(caller), row=row.seq)
    return row


def _filters_of(query: AuditQuery | ExportQuery) -> dict[str, Any]:
    asked = msgspec.to_builtins(query)
    return {name: value for name, value in asked.items() if name not in ("limit", "offset", "cursor", "format")}
