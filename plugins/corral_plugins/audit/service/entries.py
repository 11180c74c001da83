"""From what a service says to what is stored: redacted, bounded, and in the form that is hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.database.unit import Entry
from corral.plugin import AuditEntry
from corral.redact.redactor import Redactor

LIMIT = 16 * 1024
"""More bytes of changes, or of details, are not kept; the hash of the whole is."""

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
FREE = ("user_agent", "object_id", "object_name")
"""What others may have written, and so may hold a credential."""


def stored(entry: AuditEntry, by: Entry, redactor: Redactor, *, record_ip: bool) -> dict[str, Any]:
    """The columns of a row but those that its place in the chain gives it."""
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
    for name in FREE:
        if texts[name]:
            texts[name] = redactor.redact(texts[name])
    columns = {name: _cut(text, LENGTHS[name]) for name, text in texts.items()}
    changes, details = _diff(entry.changes, redactor), _canonical(redactor.redact_json(_plain(entry.details)))
    sha256 = None
    if len(changes) > LIMIT or len(details) > LIMIT:
        sha256 = hashlib.sha256(b"[" + changes + b"," + details + b"]").hexdigest()
        changes = changes if len(changes) <= LIMIT else b"[]"
        details = details if len(details) <= LIMIT else b"{}"
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
    """As JSON has it: shapes become objects, keys texts, what is of no known type its own text."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=str)


def _canonical(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value, order="sorted")
    except UnicodeEncodeError:  # half a character, from text that nobody checked
        return msgspec.json.encode(_whole(value), order="sorted")


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _cut(text: str | None, length: int) -> str | None:
    """A text that a column takes on both engines; an empty one is none, so that an export can tell them apart."""
    return text.encode("utf-8", "replace").decode().replace("\0", "�")[:length] if text else None
