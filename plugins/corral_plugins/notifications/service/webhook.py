"""Channels of the type `webhook`, which send requests according to the Standard Webhooks specification.

Nothing in this module runs in a unit of work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.egress.client import Egress
from corral.errors import Invalid
from corral.schema.conversion import encode
from corral_plugins.notifications.api import ChannelType, Json, OutgoingNotification, SendResult
from corral_plugins.notifications.service.http import ChannelHttp, judge_answer
from corral_plugins.webhooks.api import Signer

TYPE = "notification"
_RESERVED = re.compile(r"(?i)webhook-.*|content-.*|host|connection|transfer-encoding")
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "url": {
            "type": "string",
            "minLength": 1,
            "maxLength": 2048,
            "description": "The URL to which notifications are sent.",
        },
        "secret": {
            "type": "string",
            "minLength": 16,
            "maxLength": 128,
            "description": "The secret that signs the requests. Without a secret, requests are not signed.",
        },
        "headers": {
            "type": "object",
            "maxProperties": 10,
            "propertyNames": {
                "pattern": r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}(?![\s\S])",
                "patternErrorMessage": "the name of a header: at most 64 letters, digits and !#$%&'*+.^_`|~-",
            },
            "additionalProperties": {
                "type": "string",
                "maxLength": 2000,
                "pattern": r"^[\u0020-\u007e]*(?![\s\S])",
                "patternErrorMessage": "ASCII characters without line breaks",
            },
            "description": "Further headers. Put no credentials here.",
        },
    },
    "required": ["url"],
    "additionalProperties": False,
}


class WebhookChannel:
    """Sends notifications to a URL."""

    signer: Signer | None

    def __init__(self, http: ChannelHttp, egress: Egress) -> None:
        self._http, self._egress = http, egress

    def definition(self) -> ChannelType:
        """Return the definition of the channel type."""
        return ChannelType(
            type="webhook",
            title="Webhook",
            schema=SCHEMA,
            secrets=("secret",),
            send=self.send,
            check=self.check,
        )

    async def check(self, config: Mapping[str, Any]) -> Sequence[str]:
        """Raise `Invalid` if the URL or a header is not allowed, or if the secret cannot be used to sign requests."""
        for name in config.get("headers", {}):
            if _RESERVED.fullmatch(name):
                detail = "This header is reserved for Corral or HTTP."
                raise Invalid.at(f"/config/headers/{name}", "not_allowed", detail)
        if "secret" in config:
            self._check_secret(config["secret"])
        return await self._egress.check_saved_url(config["url"], pointer="/config/url")

    async def send(self, config: Mapping[str, Any], notification: OutgoingNotification) -> SendResult:
        """Send a notification."""
        body = encode(
            {
                "type": TYPE,
                "timestamp": notification.created_at,
                "id": notification.id,
                "data": {
                    "event": notification.event,
                    "severity": notification.severity,
                    "title": notification.title,
                    "body": notification.body,
                    "count": notification.count,
                    "url": notification.url,
                    "items": [msgspec.structs.asdict(each) for each in notification.items],
                },
            }
        )
        timestamp = int(clock.system_time_s())
        headers = {"webhook-id": notification.id, "webhook-timestamp": str(timestamp)}
        if "secret" in config:
            if self.signer is None:
                return SendResult(error="The webhooks plugin, which signs, is not active.", says_nothing=True)
            headers = self.signer.sign(config["secret"], message_id=notification.id, timestamp=timestamp, body=body)
        return judge_answer(await self._http.post(config["url"], body, {**config.get("headers", {}), **headers}))

    def _check_secret(self, secret: str) -> None:
        if self.signer is None:
            detail = "Requests are signed by the webhooks plugin, which is not active."
            raise Invalid.at("/config/secret", "not_allowed", detail)
        try:
            self.signer.sign(secret, message_id="-", timestamp=0, body=b"")
        except ValueError:
            detail = "must be whsec_ followed by Base64, or any other text"
            raise Invalid.at("/config/secret", "bad_format", detail) from None
