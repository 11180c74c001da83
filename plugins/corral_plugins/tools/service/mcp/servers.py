"""The registration of MCP servers by admins, who also accept the definitions of the servers' tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import locked
from corral.errors import Conflict, FieldError, Forbidden, Invalid, NotFound, Unavailable
from corral.http.answers import IfMatch
from corral.http.page import Page, PageQuery, paginate_names
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry
from corral_plugins.secrets.api import Secrets
from corral_plugins.tools.api import MCP_PREFIX
from corral_plugins.tools.models import McpServerRow, McpToolRow, ToolRow
from corral_plugins.tools.service.mcp.connections import attached_server
from corral_plugins.tools.shapes import (
    AcceptedDefinitions,
    McpServerItem,
    McpServerPatch,
    McpServerView,
    McpToolItem,
    McpToolView,
    NewMcpServer,
    ToolOverride,
)

MAX_SERVERS = 200
REVEAL = "secrets.reveal"
NO_SERVER = "There is no MCP server with this name."


class McpServers:
    """The service for MCP servers. Its methods run in the caller's unit of work."""

    audit: Audit | None
    secrets: Secrets | None

    def list_servers(self, query: PageQuery, by: Principal) -> Page[McpServerItem]:
        """List the servers, sorted by name."""
        rows = list(McpServerRow.select().order_by(McpServerRow.name).limit(MAX_SERVERS))

        def items(shown: Any) -> list[McpServerItem]:
            tools = _tools_of([row.name for row in shown])
            return [_item(row, tools.get(row.name, [])) for row in shown]

        return paginate_names(rows, query, by, scope="tools.mcp_servers", name=lambda row: row.name, make=items)

    def get(self, name: str, warnings: list[str] | None = None) -> McpServerView:
        """Return a server with its tools. Raise `NotFound` if it does not exist."""
        row = _find(name)
        prefix = f"{MCP_PREFIX}{name}."
        overrides: Any = ToolRow.select().where(ToolRow.name.startswith(prefix)).order_by(ToolRow.name)
        tools = _tools_of([name]).get(name, [])
        return McpServerView(
            name=row.name,
            version=row.version,
            transport=_transport(row),
            url=row.url,
            headers_secret=row.headers_secret,
            enabled=row.enabled,
            tool_overrides={
                each.name.removeprefix(prefix): ToolOverride(risk=each.risk, enabled=each.enabled)
                for each in overrides
                if each.risk is not None or not each.enabled
            },
            tools=[_tool_view(each) for each in tools],
            ignored_tools=row.ignored_tools,
            status=_status(row, tools),
            last_error=row.last_error,
            listed_at=row.listed_at,
            created_at=row.created_at,
            updated_at=row.updated_at,
            warnings=warnings or UNSET,
        )

    def create(self, new: NewMcpServer, *, by: Principal) -> None:
        """Store a server. Raise `Conflict` (`duplicate`) if a server with this name already exists."""
        self._check_number()
        now = clock.now()
        columns = {
            "transport": new.transport,
            "url": new.url,
            "headers_secret": new.headers_secret,
            "enabled": new.enabled,
        }
        inserted = McpServerRow.insert(
            name=new.name, version=1, ignored_tools=[], created_at=now, updated_at=now, **columns
        )
        if not inserted.on_conflict_ignore().as_rowcount().execute():
            detail = f"An MCP server named {new.name} already exists."
            raise Conflict(detail, code="duplicate", existing_id=new.name)
        self._attach(new.name, new.headers_secret, by)
        _store_overrides(new.name, new.tool_overrides, by)
        self._record_audit("create", new.name, {field: (None, value) for field, value in columns.items() if value})

    def update(self, name: str, patch: McpServerPatch, match: IfMatch, *, by: Principal) -> bool:
        """Change a server. Return whether the list of its tools must be fetched again.

        Raise `NotFound` if the server does not exist, or `Forbidden` if the stored secret would be sent to a new
        address and the caller may not reveal secrets.
        """
        row = _find(name)
        match.check(row.version)
        given: dict[str, Any] = {
            field: value
            for field in ("transport", "url", "headers_secret", "enabled")
            if (value := getattr(patch, field)) is not UNSET
        }
        changed = {field: value for field, value in given.items() if value != getattr(row, field)}
        if not changed and patch.tool_overrides is UNSET:
            return False
        secret = given.get("headers_secret", row.headers_secret)
        if "url" in changed and secret is not None and secret == row.headers_secret:
            _require_permission_to_move_secret(by)
        values = {**changed, "version": row.version + 1, "updated_at": clock.now()}
        unchanged = (McpServerRow.name == name) & (McpServerRow.version == row.version)
        if not McpServerRow.update(values).where(unchanged).execute():
            detail = "Another request changed the server at the same time; repeat the request."
            raise Unavailable(detail, code="overloaded")
        if "headers_secret" in changed:
            self._attach(name, secret, by)
        changes: dict[str, Any] = {field: (getattr(row, field), value) for field, value in changed.items()}
        if isinstance(patch.tool_overrides, dict):
            _store_overrides(name, patch.tool_overrides, by)
            changes["tool_overrides"] = (None, "changed")
        self._record_audit("update", name, changes)
        return bool(changed) and bool(given.get("enabled", row.enabled))

    def delete(self, name: str, match: IfMatch) -> None:
        """Delete a server, its tools and their overrides. Raise `NotFound` if the server does not exist."""
        locked(McpServerRow.select(McpServerRow.name).where(McpServerRow.name == name)).first()  # keeps the version
        row = _find(name)
        match.check(row.version)
        if (
            not McpServerRow.delete()
            .where((McpServerRow.name == name) & (McpServerRow.version == row.version))
            .execute()
        ):
            raise NotFound(NO_SERVER)
        McpToolRow.delete().where(McpToolRow.server == name).execute()
        ToolRow.delete().where(ToolRow.name.startswith(f"{MCP_PREFIX}{name}.")).execute()
        if self.secrets is not None:
            self.secrets.detach(attached_server(name))
        self._record_audit("delete", name, {})

    def accept(self, name: str, accepted: AcceptedDefinitions) -> None:
        """Accept tool definitions by their hashes, so that agents may use these tools.

        Raise `Invalid` (`unknown_reference`) for a hash that does not match any currently listed tool.
        """
        _find(name)
        tools = {each.definition_sha256: each for each in _tools_of([name]).get(name, [])}
        faults = [
            FieldError(
                f"/definition_sha256/{at}", "unknown_reference", "no tool of this server currently has this definition"
            )
            for at, sha256 in enumerate(accepted.definition_sha256)
            if sha256 not in tools
        ]
        if faults:
            raise Invalid(
                "The MCP server no longer lists some of the given definitions; review and accept the current "
                "definitions.",
                code="unknown_reference",
                errors=tuple(faults),
            )
        listed = (McpToolRow.server == name) & McpToolRow.definition_sha256.in_(accepted.definition_sha256)
        McpToolRow.update(accepted_sha256=McpToolRow.definition_sha256).where(listed).execute()
        newly = [tools[sha256] for sha256 in accepted.definition_sha256]
        changes = {each.name: (each.accepted_sha256, each.definition_sha256) for each in newly}
        self._record_audit("accept", name, changes)

    def _attach(self, name: str, secret: str | None, by: Principal) -> None:
        if secret is None:
            if self.secrets is not None:
                self.secrets.detach(attached_server(name))
            return
        if self.secrets is None:
            detail = "The `secrets` plugin, which stores the headers, is not active."
            raise Unavailable(detail, code="plugin_disabled", retry_after=60)
        self.secrets.attach(secret, attached_server(name), title=name, pointer="/headers_secret", by=by)

    @staticmethod
    def _check_number() -> None:
        if McpServerRow.select().count() >= MAX_SERVERS:
            raise Invalid.at("/name", "not_allowed", f"There can be at most {MAX_SERVERS} MCP servers.")

    def _record_audit(self, verb: str, name: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            shown = {**changes, "headers_secret": SECRET_CHANGE} if "headers_secret" in changes else changes
            entry = AuditEntry(
                action=f"tools.mcp_server.{verb}", object_type="mcp_server", object_id=name, changes=shown
            )
            self.audit.record(entry)


def _find(name: str) -> McpServerRow:
    row: McpServerRow | None = McpServerRow.get_or_none(McpServerRow.name == name)
    if row is None:
        raise NotFound(NO_SERVER)
    return row


def _tools_of(servers: list[str]) -> dict[str, list[McpToolRow]]:
    query = McpToolRow.select().where(McpToolRow.server.in_(servers) & (McpToolRow.is_listed == True))  # noqa: E712
    found: dict[str, list[McpToolRow]] = {}
    for row in query.order_by(McpToolRow.name):
        found.setdefault(row.server, []).append(row)
    return found


def _require_permission_to_move_secret(by: Principal) -> None:
    """Raise `Forbidden` unless the caller may send the server's stored secret to a new address.

    The operator of the new address could read the secret. The caller must therefore have re-authenticated, or use an
    API key with the scope `secrets.reveal`.
    """
    if by.has_stepped_up or REVEAL in by.named_scopes:
        return
    detail = "The stored headers_secret would be sent to a different url. Name the secret of the new url"
    if by.kind == "api_key":
        raise Forbidden(f"{detail}, or use an API key with the scope {REVEAL}.", code="insufficient_scope")
    raise Forbidden(f"{detail}, or confirm your identity with `corral api POST /auth/reauth`.", code="reauth_required")


def _store_overrides(server: str, overrides: Mapping[str, ToolOverride], by: Principal) -> None:
    """Store the risks and states that an admin sets for a server's tools. Tools missing from `overrides` are reset."""
    prefix = f"{MCP_PREFIX}{server}."
    others = ToolRow.name.startswith(prefix) & ToolRow.name.not_in([f"{prefix}{tool}" for tool in overrides])
    common = {"updated_at": clock.now(), "updated_by": by.user_id}
    ToolRow.update(risk=None, enabled=True, version=ToolRow.version + 1, **common).where(others).execute()
    for tool, override in overrides.items():
        values = {"risk": override.risk, "enabled": override.enabled, **common}
        row = {"name": f"{prefix}{tool}", "version": 2, **values}
        changed = {**values, "version": ToolRow.version + 1}
        ToolRow.insert(row).on_conflict(conflict_target=[ToolRow.name], update=changed).execute()


def _transport(row: McpServerRow) -> Any:
    return row.transport


def _status(row: McpServerRow, tools: list[McpToolRow]) -> Any:
    if row.last_error is not None or row.listed_at is None:
        return "down"
    return "ok" if all(map(_is_accepted, tools)) else "changed"


def _is_accepted(tool: McpToolRow) -> bool:
    return bool(tool.definition_sha256 == tool.accepted_sha256)


def _item(row: McpServerRow, tools: list[McpToolRow]) -> McpServerItem:
    return McpServerItem(
        name=row.name,
        version=row.version,
        transport=_transport(row),
        url=row.url,
        enabled=row.enabled,
        status=_status(row, tools),
        last_error=row.last_error,
        tools=[McpToolItem(name=each.name, status="ok" if _is_accepted(each) else "changed") for each in tools],
        listed_at=row.listed_at,
        created_at=row.created_at,
    )


def _tool_view(row: McpToolRow) -> McpToolView:
    return McpToolView(
        name=row.name,
        status="ok" if _is_accepted(row) else "changed",
        remote_name=row.remote_name,
        **row.definition,
        definition_sha256=row.definition_sha256,
        accepted_sha256=row.accepted_sha256,
    )
