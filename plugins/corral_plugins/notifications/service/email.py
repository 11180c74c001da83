"""Channels of the type `email`. Nothing in this module runs in a unit of work."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from corral_core.accounts.api import Mail, MailFailed, MailRefused, PluginEmail
from corral_plugins.notifications.api import ChannelType, Json, OutgoingNotification, SendResult
from corral_plugins.notifications.service.plain_text import one_line

BREAKER = "smtp"
PREFERENCES = "Change your preferences: corral notifications preferences"
MAX_SUBJECT = 200
_PART = r"[^\s@<>,;:\"\\()\u0000-\u001f\u007f-\u009f]"
ADDRESS = rf"^{_PART}{{1,64}}@{_PART}{{1,190}}(?![\s\S])"  # one address, and nothing that a header would break at
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "to": {
            "type": "array",
            "minItems": 1,
            "maxItems": 50,
            "uniqueItems": True,
            "items": {
                "type": "string",
                "maxLength": 254,
                "pattern": ADDRESS,
                "patternErrorMessage": "one email address, such as ops@example.org",
            },
            "description": "The addresses that receive every mail.",
        },
        "to_recipients": {"const": True, "description": "Each recipient of a rule gets a mail at their own address."},
        "subject_prefix": {
            "type": "string",
            "maxLength": 60,
            "pattern": r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*(?![\s\S])",
            "patternErrorMessage": "one line of text without control characters",
            "description": "A text that precedes the subject.",
        },
    },
    "oneOf": [{"required": ["to"]}, {"required": ["to_recipients"]}],
    "additionalProperties": False,
}


class EmailChannel:
    """Sends notifications by email, through the mail server configured in the `mail.*` settings."""

    def __init__(self, mail: Mail) -> None:
        self._mail = mail

    def definition(self) -> ChannelType:
        """Return the definition of the channel type."""
        return ChannelType(type="email", title="Email", schema=SCHEMA, secrets=(), send=self.send, breaker=BREAKER)

    async def send(self, config: Mapping[str, Any], notification: OutgoingNotification) -> SendResult:
        """Send an email to each address that has not received it yet, even if another address is refused.

        `notification.served` lists the addresses that have received the email, so that they do not receive it again if
        the attempt is interrupted and repeated.
        """
        addresses = [notification.to] if notification.to is not None else config.get("to", [])
        served, refused = notification.served, ""
        for address in addresses:
            if address in served:
                continue
            try:
                await self._mail.send_plugin_email(_plugin_email(address, config, notification))
            except (MailRefused, ValueError) as error:
                refused = f"{address}: {error}"
            except MailFailed as error:
                return SendResult(error=str(error), served=served)
            else:
                served.append(address)
        if refused:
            return SendResult(error=refused[:500], permanent=True, says_nothing=True, served=served)
        return SendResult(served=served)


def _plugin_email(address: str, config: Mapping[str, Any], notification: OutgoingNotification) -> PluginEmail:
    prefix = config.get("subject_prefix", "")
    return PluginEmail(
        to=address,
        subject=one_line(f"{prefix} {notification.title}", MAX_SUBJECT),
        text=_text(notification),
        html=_html(notification),
        headers={"X-Corral-Event": one_line(notification.event, 100)},
    )


def _text(notification: OutgoingNotification) -> str:
    parts = [notification.title, notification.body, notification.url or ""]
    if notification.preferences_url is not None:
        parts.append(f"-- \n{PREFERENCES}\n{notification.preferences_url}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _html(notification: OutgoingNotification) -> str:
    def link(url: str, text: str) -> str:
        return f'<p><a href="{html.escape(url)}">{text}</a></p>'

    body = html.escape(notification.body).replace("\n", "<br>\n")
    parts = [f"<h2>{html.escape(notification.title)}</h2>", f"<p>{body}</p>" if body else ""]
    parts.append(link(notification.url, "In the API (with your token)") if notification.url else "")
    parts.append(link(notification.preferences_url, PREFERENCES) if notification.preferences_url else "")
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"></head><body>'
    return head + "\n".join(part for part in parts if part) + "</body></html>\n"
