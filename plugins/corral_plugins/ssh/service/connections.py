"""Lists, creates, changes and deletes connections, and stores their host keys.

All methods run in the caller's unit of work.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid, NotFound, TooMany
from corral.events.event import SystemAlert, emit
from corral.http.answers import IfMatch
from corral.http.page import Page, paginate_names
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry
from corral_plugins.ssh.api import SshHostKeyMismatch
from corral_plugins.ssh.models import Connection, Execution
from corral_plugins.ssh.service.credentials import ConnectionCredentials
from corral_plugins.ssh.service.host_keys import fingerprint_of, key_type_of
from corral_plugins.ssh.shapes import (
    ConnectionPatch,
    ConnectionQuery,
    ConnectionView,
    NewConnection,
    Status,
)

MAX_CONNECTIONS = 1000
PLAIN_FIELDS = (
    "name",
    "hostname",
    "port",
    "username",
    "auth_method",
    "host_key_policy",
    "allowed_commands",
    "denied_commands",
    "require_approval",
    "max_concurrency",
    "description",
    "tags",
)
SECRET_COLUMNS = ("secret_id", "passphrase_secret_id")


class SshConnections:
    """Manages SSH connections and their accepted host keys."""

    audit: Audit | None

    def __init__(self, credentials: ConnectionCredentials) -> None:
        self._credentials = credentials

    # -- reading

    def list(self, query: ConnectionQuery, *, by: Principal) -> Page[ConnectionView]:
        """Return a page of the connections that match every filter, sorted by name."""
        rows = list(Connection.select().order_by(Connection.name_key).limit(MAX_CONNECTIONS))
        found = [row for row in rows if _matches(row, query)]

        def views(shown: Sequence[Connection]) -> list[ConnectionView]:
            return [view_of(row) for row in shown]

        return paginate_names(found, query, by, scope="ssh.connections", name=lambda row: row.name_key, make=views)

    def find(self, connection_id: str) -> Connection:
        """Return the row of a connection. Raise `NotFound` if there is no such connection."""
        row: Connection | None = Connection.get_or_none(Connection.id == connection_id.lower())
        if row is None:
            raise NotFound("There is no SSH connection with this id; `corral ssh list` lists all connections.")
        return row

    # -- writing

    def create(self, new: NewConnection, host_key: str | None, *, by: Principal) -> Connection:
        """Create a connection. The caller must have checked the fields.

        Raise `TooMany` (`quota_exceeded`) if there are already `MAX_CONNECTIONS` connections, and `Conflict`
        (`duplicate`) if the name is taken.
        """
        if Connection.select().count() >= MAX_CONNECTIONS:
            raise TooMany(
                f"There are already {MAX_CONNECTIONS} SSH connections, which is the maximum; delete one first.",
                code="quota_exceeded",
            )
        now = clock.now()
        row = Connection(
            **{field: getattr(new, field) for field in PLAIN_FIELDS},
            id=new_id(),
            created_by=by.user_id,
            created_at=now,
            updated_at=now,
            name_key=new.name.lower(),
            host_key=host_key,
            host_key_state="unknown" if host_key is None else "trusted",
        )
        if not Connection.insert(row.__data__).on_conflict_ignore().as_rowcount().execute():
            raise _duplicate_error(new.name)
        if secrets := self._credentials.store(row, new, by):
            Connection.update(secrets).where(Connection.id == row.id).execute()
        self._record_audit("create", row, {field: (None, getattr(row, field)) for field in PLAIN_FIELDS}, secrets)
        return self.find(row.id)

    def update(
        self,
        connection_id: str,
        patch: ConnectionPatch,
        host_key: str | None,
        match: IfMatch,
        *,
        checked_version: int,
        by: Principal,
    ) -> Connection:
        """Change a connection.

        The caller must have checked the new fields against the version `checked_version` of the connection.
        """
        row = self.find(connection_id)
        match.check(row.version)
        if row.version != checked_version:
            raise _changed_error()
        given = {field: value for field in PLAIN_FIELDS if (value := getattr(patch, field)) is not UNSET}
        changed = {field: value for field, value in given.items() if value != getattr(row, field)}
        changes = {field: (getattr(row, field), value) for field, value in changed.items()}
        columns = {**changed, **_host_key_columns(row, changed, host_key)}
        if "name" in changed:
            columns["name_key"] = changed["name"].lower()
        if "auth_method" in changed:
            columns |= self._credentials.remove_secrets(row, by)
            row.secret_id = row.passphrase_secret_id = None
        secrets = self._credentials.store(row, patch, by)
        columns |= secrets
        if columns:
            self._write(row, columns)
            self._record_audit("update", row, changes, secrets)
        return self.find(row.id)

    def delete(self, connection_id: str, match: IfMatch, *, by: Principal) -> None:
        """Delete a connection and the secrets that were submitted with it. The records of its commands are kept.

        Raise `Conflict` (`in_use`) while commands are running.
        """
        row = self.find(connection_id)
        match.check(row.version)
        self._write(row, {})  # locks the row, so that no command starts meanwhile
        running = Execution.select(Execution.id).where(
            (Execution.connection_id == row.id) & (Execution.status == "running")
        )
        if ids := [each.id for each in running.limit(100)]:
            detail = "Commands are running on this machine; wait for their end or cancel them."
            raise Conflict(detail, code="in_use", references=[{"kind": "execution", "id": each} for each in ids])
        self._credentials.remove_secrets(row, by)
        Connection.delete().where(Connection.id == row.id).execute()
        self._record_audit("delete", row, {}, {})

    def accept_host_key(self, connection_id: str, fingerprint: str, match: IfMatch) -> Connection:
        """Accept the host key that the machine presented most recently.

        Raise `Conflict` if that key has a different fingerprint, or if the machine has not presented a key yet.
        """
        row = self.find(connection_id)
        match.check(row.version)
        if row.seen_key is None:
            detail = "The machine has not shown a host key yet; test the connection first."
            raise Conflict(detail, current_status=row.host_key_state)
        seen = fingerprint_of(row.seen_key)
        if fingerprint != seen:
            detail = f"The last host key of the machine has the fingerprint {seen}."
            raise Conflict(detail, current_status=row.host_key_state, fingerprint_sha256=seen)
        changes = {"host_key": (fingerprint_of(row.host_key), seen)}
        self._write(row, {"host_key": row.seen_key, "host_key_state": "trusted", "last_error": None})
        if self.audit is not None:
            self.audit.record(_audit_entry("ssh.host_key.accept", row, changes))
        return self.find(row.id)

    # -- what a connection to the machine showed

    def record_seen_key(self, tried: Connection, key_line: str) -> Conflict:
        """Store a presented host key that has not been accepted, and return the error to raise.

        `tried` is the connection as it was before the machine presented the key. The key is not stored if the
        connection's address has changed since then, or if the key has been accepted in the meantime.
        """
        row = self.find(tried.id)
        is_accepted = row.host_key_state == "trusted" and row.host_key == key_line
        if is_accepted or (row.hostname, row.port) != (tried.hostname, tried.port):
            return _changed_error()
        seen, type_ = fingerprint_of(key_line), key_type_of(key_line)
        if row.host_key is None:
            self._write(row, {"seen_key": key_line, "host_key_state": "pending"})
            accept = f"corral ssh accept-key {shlex.quote(row.name)} {seen}"
            shows = f"The machine shows a host key ({type_}) that nobody has accepted yet: {seen}"
            detail = f"{shows}. If it is the machine's own, accept it: {accept}"
            return Conflict(detail, code="host_key_unverified", key_type=type_, fingerprint_sha256=seen)
        if row.host_key_state != "mismatch" or row.seen_key != key_line:
            self._write(row, {"seen_key": key_line, "host_key_state": "mismatch"})
            if key_line != row.host_key:
                _alert_admins(row, str(fingerprint_of(row.host_key)), str(seen))
        return host_key_mismatch_error(row)

    def record_test(self, connection_id: str, error: str | None) -> None:
        """Store the outcome of a test. Does nothing if the connection has been deleted in the meantime."""
        outcome = {"last_tested_at": clock.now(), "last_error": error}
        Connection.update(outcome).where(Connection.id == connection_id).execute()

    def _write(self, row: Connection, columns: dict[str, Any]) -> None:
        values = {**columns, "version": row.version + 1, "updated_at": clock.now()}
        unchanged = (Connection.id == row.id) & (Connection.version == row.version)
        try:
            written = Connection.update(values).where(unchanged).execute()
        except peewee.IntegrityError:
            detail = f"An SSH connection named {columns['name']} already exists."
            raise Conflict(detail, code="duplicate") from None
        if not written:
            raise _changed_error()
        for column, value in values.items():
            setattr(row, column, value)

    def _record_audit(
        self, verb: str, row: Connection, changes: dict[str, tuple[Any, Any]], secrets: dict[str, Any]
    ) -> None:
        if self.audit is not None:
            shown = {**changes, **{column: SECRET_CHANGE for column in SECRET_COLUMNS if column in secrets}}
            self.audit.record(_audit_entry(f"ssh.connection.{verb}", row, shown))


def host_key_mismatch_error(row: Connection) -> Conflict:
    """Return the error to raise for a connection whose machine presented a host key other than the accepted one."""
    old, new = fingerprint_of(row.host_key), fingerprint_of(row.seen_key)
    accept = f"corral ssh accept-key {shlex.quote(row.name)} {new}"
    shows = f"The machine showed the host key {new}, but the accepted one is {old}. No credential was sent."
    detail = f"{shows} If the machine has a new key, an admin can accept it: {accept}"
    if old == new:
        detail = f"The machine shows the accepted host key {old} again. Accept it to end the block: {accept}"
    key_type = key_type_of(row.seen_key or "")
    return Conflict(detail, code="host_key_mismatch", key_type=key_type, fingerprint_sha256=new)


def view_of(row: Connection, warnings: Sequence[str] = ()) -> ConnectionView:
    """Return the response body of a connection."""
    names = set(ConnectionView.__struct_fields__) - {
        "has_credential",
        "host_key_fingerprint",
        "seen_fingerprint",
        "status",
        "warnings",
    }
    return ConnectionView(
        **{name: getattr(row, name) for name in names},
        has_credential=row.secret_id is not None,
        host_key_fingerprint=fingerprint_of(row.host_key),
        seen_fingerprint=fingerprint_of(row.seen_key),
        status=_status(row),
        warnings=list(warnings) or UNSET,
    )


def check_policy(policy: str, host_key: str | None, *, has_key: bool) -> None:
    """Raise `Invalid` if the host key policy and the presence of a host key in the request are incompatible.

    The policy `strict` requires a host key, unless `has_key` says that the connection already has an accepted one. The
    policy `tofu` does not allow a host key in the request.
    """
    if policy == "strict" and host_key is None and not has_key:
        detail = "The policy strict needs the host key: the line in /etc/ssh/ssh_host_ed25519_key.pub of the machine."
        raise Invalid.at("/host_key", "required", detail)
    if policy == "tofu" and host_key is not None:
        raise Invalid.at("/host_key", "not_allowed", "A host key can be given in advance only with the policy strict.")


def _host_key_columns(row: Connection, changed: dict[str, Any], host_key: str | None) -> dict[str, Any]:
    """Return the host key columns to change. If the address changes, a host key must be accepted again."""
    if host_key is not None:
        return {"host_key": host_key, "host_key_state": "trusted", "seen_key": None}
    if changed.keys() & {"hostname", "port"}:
        return {"host_key": None, "host_key_state": "unknown", "seen_key": None}
    return {}


def _status(row: Connection) -> Status:
    if row.host_key_state == "mismatch":
        return "blocked"
    if row.last_tested_at is None:
        return "untested"
    return "ok" if row.last_error is None else "failing"


def _matches(row: Connection, query: ConnectionQuery) -> bool:
    if isinstance(query.search, str):
        text = f"{row.name}\n{row.hostname}\n{row.description}".lower()
        if query.search.lower() not in text:
            return False
    if not isinstance(query.tag, msgspec.UnsetType) and not set(query.tag) <= set(row.tags):
        return False
    return isinstance(query.status, msgspec.UnsetType) or _status(row) in query.status


def _alert_admins(row: Connection, old: str, new: str) -> None:
    command = f"corral ssh accept-key {shlex.quote(row.name)} {new}"
    reason = (
        f"{row.hostname}:{row.port} shows {new} instead of {old}. The connection is blocked until an admin accepts the "
        f"new key or deletes the connection. If the key is the machine's own: {command}"
    )
    mismatch = SshHostKeyMismatch(connection_id=row.id, name=row.name, old=old, new=new, reason=reason)
    emit(mismatch, object=("ssh_connection", row.id))
    alert = SystemAlert(
        kind="ssh_host_key_mismatch",
        severity="critical",
        title=f"The host key of {row.name} has changed",
        detail=reason,
        object={"type": "ssh_connection", "id": row.id},
    )
    emit(alert, object=("ssh_connection", row.id))


def _audit_entry(action: str, row: Connection, changes: dict[str, tuple[Any, Any]]) -> AuditEntry:
    return AuditEntry(
        action=action, object_type="ssh_connection", object_id=row.id, object_name=row.name, changes=changes
    )


def _changed_error() -> Conflict:
    detail = "Another request changed the connection at the same time; repeat the request."
    return Conflict(detail, current_status="changed")


def _duplicate_error(name: str) -> Conflict:
    found: Connection | None = Connection.get_or_none(Connection.name_key == name.lower())
    existing = {} if found is None else {"existing_id": found.id}
    return Conflict(f"An SSH connection named {name} already exists.", code="duplicate", **existing)
