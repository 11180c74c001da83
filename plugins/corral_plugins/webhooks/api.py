"""The public interface of the `webhooks` plugin: events, and the service that signs requests."""

from __future__ import annotations

from typing import Protocol

from corral.database.model import PRIVATE
from corral.errors import declare_codes
from corral.events.event import Event

declare_codes({"batch_in_progress": (409, "Another run is in progress", "Wait until the running operation has ended.")})


def connection_error_text(error: Exception) -> str:
    """Say why a request got no response. Without this, people would read constants of OpenSSL and values of Python."""
    text = str(error).rstrip(".")
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
        return f"the TLS certificate was refused: {reason or 'it is not trusted'}"
    if text.startswith("[SSL"):
        reason = text.partition("] ")[2].partition(" (_ssl")[0]
        return f"the TLS handshake failed ({reason}); check whether the server speaks TLS on this port"
    if ": bytearray(" in text:  # the bytes of a response that is none
        return f"the server sent no valid HTTP response ({text.partition(': bytearray(')[0]})"
    return text or "the connection was closed"


class Signer(Protocol):
    """Signs requests as defined by Standard Webhooks 1.0.0. No unit of work is required."""

    def sign(self, secret: str, *further: str, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers `webhook-id`, `webhook-timestamp` and `webhook-signature` for a request.

        `secret` is either `whsec_` followed by a Base64 key, or any other text, whose bytes are the key. For each
        `further` secret, the header contains an additional signature, so that receivers accept the request while a
        secret is being replaced. `timestamp` is the time of the attempt in epoch seconds, and `body` is the exact
        request body.
        """
        ...


class WebhookEvent(Event, kw_only=True):
    """The fields that all webhook events share."""

    visibility = PRIVATE

    webhook_id: str


class WebhookCreated(WebhookEvent, kw_only=True):
    """A webhook was created."""

    event = "webhook.created"


class WebhookUpdated(WebhookEvent, kw_only=True):
    """The owner of a webhook changed, enabled or disabled it."""

    event = "webhook.updated"


class WebhookDeleted(WebhookEvent, kw_only=True):
    """A webhook was deleted."""

    event = "webhook.deleted"


class WebhookDisabled(WebhookEvent, kw_only=True):
    """A webhook was disabled by Corral or by an admin."""

    event = "webhook.disabled"

    reason: str


EVENTS: tuple[type[Event], ...] = (WebhookCreated, WebhookUpdated, WebhookDeleted, WebhookDisabled)
