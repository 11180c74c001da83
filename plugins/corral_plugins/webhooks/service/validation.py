"""Checks submitted fields before anything is stored. The checks run outside units of work."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType

from corral.crypto import refuse_mask
from corral.egress.client import Egress
from corral.egress.guard import read_url
from corral.errors import FieldError, Invalid
from corral.redact.encodings import is_redactable
from corral_plugins.webhooks.service.payloads import WebhookEvents
from corral_plugins.webhooks.service.signing import check_secret
from corral_plugins.webhooks.shapes import NewWebhook, WebhookPatch

NOT_REDACTABLE = "not_redactable"
_RESERVED = re.compile(r"(?i)webhook-.*|content-.*|host|connection|transfer-encoding")


class CheckedWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """The results of the checks: the URL's host, the events without duplicates, and warnings."""

    host: str = ""
    events: list[str] = []
    warnings: list[str] = []


class WebhookChecks:
    """Checks new webhooks and changes to webhooks."""

    def __init__(self, egress: Egress, events: WebhookEvents) -> None:
        self._egress, self._events = egress, events

    async def check(self, given: NewWebhook | WebhookPatch) -> CheckedWebhook:
        """Check the given fields. Raise `Invalid` if a field is not valid."""
        warnings: list[str] = []
        if given.secret is not UNSET:
            check_secret(given.secret, "/secret")
            warnings += [] if is_redactable(given.secret) else [NOT_REDACTABLE]
        if given.headers is not UNSET:
            warnings += _check_headers(given.headers)
        events = [] if given.events is UNSET else self._events.check(given.events)
        host = ""
        if given.url is not UNSET:
            warnings += await self._egress.check_saved_url(given.url, pointer="/url")
            host = read_url(given.url).host
        return CheckedWebhook(host=host, events=events, warnings=list(dict.fromkeys(warnings)))


def check_new_secret(secret: str | UnsetType) -> str | None:
    """Check a submitted secret and return it. Return None if no secret was submitted."""
    if secret is UNSET:
        return None
    check_secret(secret, "/secret")
    return secret


def _check_headers(headers: Mapping[str, str]) -> list[str]:
    """Check headers and return warnings about them.

    Raise `Invalid` for headers that are reserved for Corral or HTTP, for masked values, and for repeated names.
    """
    reserved = [name for name in headers if _RESERVED.fullmatch(name)]
    if reserved:
        faults = [
            FieldError(f"/headers/{name}", "not_allowed", "This header is reserved for Corral or HTTP.")
            for name in reserved
        ]
        raise Invalid(
            f"The header {reserved[0]} cannot be set, because it is reserved for Corral or HTTP.", errors=faults
        )
    for name, value in headers.items():
        refuse_mask(value, f"/headers/{name}")
    if len({name.lower() for name in headers}) < len(headers):
        raise Invalid.at("/headers", "not_unique", "Two headers have the same name.")
    return [] if all(is_redactable(value) for value in headers.values()) else [NOT_REDACTABLE]
