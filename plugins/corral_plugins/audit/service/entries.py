"""Converts audit entries to database columns: redacts them, limits their length and encodes canonical JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.database.unit import Entry
from corral.plugin import AuditEntry
from corral.redact.redactor import Redactor

MAX_BYTES = 16 * 1024
"""Maximum size in bytes of `changes` and of `details`. Larger ones are dropped; a hash of the full content is kept."""

LENGTHS = {
    "actor_type": 20,
    "actor_id": 80,
    "on_behalf_of": 80,
    "session_id": 80,
    "key_id": 80,
    "ip": 45,
    "user_agent": 300,
    "action": 120,
    "object_type": 60,
    "object_id": 200,
    "object_name": 300,
    "code": 80,
    "request_id": 64,
}
USER_SUPPLIED = ("user_agent", "object_id", "object_name")
"""Columns with user-supplied text, which may contain a credential."""


def stored(entry: AuditEntry, by: Entry, redactor: Redactor, *, record_ip: bool) -> dict[str, Any]:
    """Return the columns of an audit row, except those that depend on its position in the hash chain."""
    actor = by.actor
    texts: dict[str, Any] = {
        "actor_type": actor.type,
        "actor_id": actor.id,
        "on_behalf_of": actor.on_behalf_of,
        "session_id": actor.session_id,
        "key_id": actor.key_id,
        "ip": by.client_ip if record_ip else None,
        "user_agent": by.user_agent if record_ip else None,
        "action": entry.action,
        "object_type": entry.object_type,
        "object_id": entry.object_id,
        "object_name": entry.object_name,
        "code": entry.code,
        "request_id": by.request_id,
    }
    for name in USER_SUPPLIED:
        if texts[name]:
            texts[name] = redactor.redact(texts[name])
    columns = {name: _cut(text, LENGTHS[name]) for name, text in texts.items()}
    changes, details = _diff(entry.changes, redactor), _canonical(redactor.redact_json(_plain(entry.details)))
    sha256 = None
    if len(changes) > MAX_BYTES or len(details) > MAX_BYTES:
        sha256 = hashlib.sha256(b"[" + changes + b"," + details + b"]").hexdigest()
        changes = changes if len(changes) <= MAX_BYTES else b"[]"
        details = details if len(details) <= MAX_BYTES else b"{}"
    return {
        **columns,
        "outcome": entry.outcome,
        "changes": changes.decode(),
        "details": details.decode(),
        "sha256": sha256,
    }


def _diff(changes: Mapping[str, tuple[Any, Any]], redactor: Redactor) -> bytes:
    fields = [{"field": name, "from": _plain(before), "to": _plain(after)} for name, (before, after) in changes.items()]
    return _canonical(redactor.redact_json(fields))


def _plain(value: Any) -> Any:
    """Convert a value to JSON types. Structs become objects; keys and values of unknown types become strings."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=str)


def _canonical(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, order="sorted")
    except UnicodeEncodeError:  # unchecked text can contain a lone surrogate
        return msgspec.json.encode(_without_surrogates(value), order="sorted")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def _cut(text: str | None, length: int) -> str | None:
    """Truncate a text and replace characters that a database cannot store.

    An empty text becomes None, because CSV cannot distinguish the two.
    """
    return text.encode("utf-8", "replace").decode().replace("\0", "�")[:length] if text else None
