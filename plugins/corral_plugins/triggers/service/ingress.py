"""Receives deliveries for webhook triggers: verifies the signature over the raw bytes, and records the slot.

The response is sent only after the row is committed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable
from typing import Any

import msgspec

from corral import clock
from corral.crypto import Sealer, associated_data, digest
from corral.database.engine import Work
from corral.database.unit import ANONYMOUS, UnitContext
from corral.errors import Conflict, Invalid, NotFound, Problem, Unauthorized
from corral.http.answers import Request
from corral.http.routes import Rate
from corral.ids import new_id
from corral.plugin import RateLimits
from corral.schema.json_schema_validation import json_schema_errors
from corral.schema.strict_json import parse_json
from corral_plugins.triggers.models import IS_ENABLED, Fire, Trigger
from corral_plugins.triggers.service.slots import TriggerSlots
from corral_plugins.triggers.shapes import DeliveryAnswer

DELIVERIES = Rate("webhook delivery", 600, 60, "key")
UNKNOWN_TOKENS = Rate("webhook token", 120, 60, "key")
MAX_AGE_SECONDS = 300.0
MAX_FORM_FIELDS = 1000
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
_DELIVERY_HEADERS = ("x-github-delivery", "webhook-id", "idempotency-key")


class VerifiedDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A verified delivery. `id` is the hash of the sender's delivery id, or None if the sender provided none."""

    payload: Any
    facts: dict[str, Any]
    sha256: str
    id: str | None


class TriggerIngress:
    """Receives deliveries. Call `receive` outside units of work."""

    limits: RateLimits | None

    def __init__(self, work: Work, sealer: Sealer, slots: TriggerSlots) -> None:
        self._work, self._sealer, self._slots = work, sealer, slots

    async def receive(self, token: str, body: bytes, request: Request) -> DeliveryAnswer:
        """Record a delivery. Raise `NotFound` if the token is unknown, and `Unauthorized` if the signature is wrong."""
        hashed = digest(token)
        trigger = await self._work(lambda: _find_trigger(hashed), read=True)
        if self.limits is not None:
            self.limits.take(DELIVERIES if trigger else UNKNOWN_TOKENS, hashed if trigger else request.client_ip)
        if trigger is None:
            raise NotFound("There is no webhook with this address.")
        self._verify(trigger, body, request)
        delivery = _read_delivery(trigger, body, request)
        entry = UnitContext(
            label="POST /hooks/{token}",
            actor=ANONYMOUS,
            request_id=request.request_id,
            client_ip=request.client_ip,
        )
        return await self._work(lambda: self._record(trigger, delivery), entry=entry)

    def _record(self, trigger: Trigger, delivery: VerifiedDelivery) -> DeliveryAnswer:
        """Insert a history row for a delivery.

        Return the row's id, or the id of an earlier row for the same delivery.
        """
        slot = f"delivery:{delivery.id or new_id()}"
        fields = {"payload": delivery.payload, "event": delivery.facts, "is_tainted": True}
        made = self._slots.record(trigger, slot, body_sha256=delivery.sha256, **fields)
        if made is not None:
            return DeliveryAnswer(execution_id=made.id)
        first: Fire = Fire.get((Fire.trigger_id == trigger.id) & (Fire.slot == slot))
        if first.body_sha256 != delivery.sha256:
            raise Conflict(
                "Another delivery with this id had a different body; use a new id for each delivery.",
                code="duplicate",
                existing_id=first.id,
            )
        reason = f"The delivery was received before, as {first.id}."
        self._slots.record(trigger, f"duplicate:{new_id()}", status="duplicate", reason=reason)
        return DeliveryAnswer(execution_id=first.id, duplicate=True)

    def _verify(self, trigger: Trigger, body: bytes, request: Request) -> None:
        """Raise `Unauthorized` unless the body is signed with one of the valid secrets.

        The error does not reveal the reason.
        """
        auth = trigger.config.get("auth", "token")
        if auth == "token":
            return
        verify = {
            "hmac_sha256": _has_hex_signature,
            "github": _has_github_signature,
            "standard": _has_standard_webhooks_signature,
        }
        check: Callable[..., bool] = verify[auth]
        matches = [check(trigger, body, request, secret) for secret in self._secrets(trigger)]  # all, in constant time
        if not any(matches):
            raise Unauthorized("The signature is missing or incorrect.", code="invalid_signature")

    def _secrets(self, trigger: Trigger) -> list[str]:
        aad = associated_data("triggers_triggers", trigger.id, 1, "secret")
        is_old_valid = trigger.old_until is not None and trigger.old_until > clock.now()
        stored = [trigger.secret, trigger.old_secret if is_old_valid else None]
        return [self._sealer.decrypt(bytes.fromhex(each), aad=aad).decode() for each in stored if each is not None]


def _find_trigger(hashed: str) -> Trigger | None:
    is_current = Trigger.token_hash == hashed
    is_old = (Trigger.old_token_hash == hashed) & (Trigger.old_until > clock.now())
    row: Trigger | None = Trigger.get_or_none(IS_ENABLED & (is_current | is_old))
    return row


def _read_delivery(trigger: Trigger, body: bytes, request: Request) -> VerifiedDelivery:
    payload = parse_json(body) if _media_type(request) == JSON else _form_fields(body)
    if (schema := trigger.config.get("payload_schema")) is not None and (faults := json_schema_errors(schema, payload)):
        raise Invalid("The payload does not match the schema of the webhook.", code="schema_mismatch", errors=faults)
    own = trigger.config.get("dedupe_header")
    names = (own.lower(),) if own else _DELIVERY_HEADERS
    given = next((value for name in names if (value := request.header(name))), None)
    facts = {"delivery_id": given, "type": request.header("x-github-event")}
    identifier = hashlib.sha256(given.encode()).hexdigest() if given else None
    return VerifiedDelivery(payload=payload, facts=facts, sha256=hashlib.sha256(body).hexdigest(), id=identifier)


def _media_type(request: Request) -> str:
    """Return the body's media type. Raise a `Problem` unless the body is uncompressed JSON or form data in UTF-8."""
    media, _, parameters = (request.header("content-type") or "").lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    is_encoded = request.header("content-encoding") not in (None, "identity")
    if is_encoded or media.strip() not in (JSON, FORM) or charset not in ("", "utf-8"):
        raise Problem(f"Send {JSON} or {FORM} in UTF-8, without compression.", code="unsupported_media_type")
    return media.strip()


def _form_fields(body: bytes) -> dict[str, str]:
    from urllib.parse import parse_qsl

    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FORM_FIELDS)
    except ValueError:
        raise Problem("The form is not UTF-8 or has too many fields.", code="malformed_request") from None
    fields: dict[str, str] = parse_json(msgspec.json.encode(dict(pairs)))  # refuses characters that cannot be stored
    return fields


def _has_hex_signature(trigger: Trigger, body: bytes, request: Request, secret: str) -> bool:
    name = trigger.config.get("signature_header") or "X-Signature-256"
    moment = request.header("x-timestamp") or request.header("x-signature-timestamp")
    return _is_hex_hmac(request.header(name.lower()), body, secret) and (moment is None or _is_recent(moment))


def _has_github_signature(trigger: Trigger, body: bytes, request: Request, secret: str) -> bool:
    return _is_hex_hmac(request.header("x-hub-signature-256"), body, secret)


def _is_hex_hmac(given: str | None, body: bytes, secret: str) -> bool:
    wanted = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    text = (given or "").strip().lower().removeprefix("sha256=")
    return hmac.compare_digest(text.encode("utf-8", "replace"), wanted.encode())


def _has_standard_webhooks_signature(trigger: Trigger, body: bytes, request: Request, secret: str) -> bool:
    """Return whether the request has a valid and recent signature as defined by Standard Webhooks."""
    identifier, moment = request.header("webhook-id") or "", request.header("webhook-timestamp") or ""
    key = base64.b64decode(secret.partition("_")[2])
    signed = f"{identifier}.{moment}.".encode("utf-8", "replace") + body
    wanted = b"v1," + base64.b64encode(hmac.digest(key, signed, "sha256"))
    given = (request.header("webhook-signature") or "").split()
    matches = [hmac.compare_digest(each.encode("utf-8", "replace"), wanted) for each in given]
    return any(matches) and bool(identifier) and _is_recent(moment)


def _is_recent(moment: str) -> bool:
    if not re.fullmatch(r"[0-9]{1,13}", moment):
        return False
    seconds = int(moment) / (1000 if len(moment) > 11 else 1)
    return abs(clock.system_time_s() - seconds) <= MAX_AGE_SECONDS
