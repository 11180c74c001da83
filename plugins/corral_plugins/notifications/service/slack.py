"""Channels of the type `slack`. Nothing in this module runs in a unit of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral.egress.client import Egress
from corral.errors import Invalid
from corral_plugins.notifications.api import ChannelType, Json, OutgoingNotification, SendResult
from corral_plugins.notifications.service.http import ChannelHttp, judge_answer
from corral_plugins.notifications.service.plain_text import truncate, without_markup

WEBHOOKS = "https://hooks.slack.com/"
API = "https://slack.com/api/chat.postMessage"
LIMIT = 35_000
TEMPORARY = frozenset({"ratelimited", "internal_error", "fatal_error", "service_unavailable", "request_timeout"})
TEXT: Json = {
    "type": "string",
    "minLength": 1,
    "maxLength": 2048,
    "pattern": r"^[\x21-\x7e]+(?![\s\S])",
    "patternErrorMessage": "ASCII characters without spaces",
}
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "webhook_url": {**TEXT, "description": f"An incoming webhook, which begins with {WEBHOOKS}"},
        "bot_token": {**TEXT, "description": "The token of a bot with the scope chat:write."},
        "channel": {**TEXT, "maxLength": 80, "description": "The id or name of the channel, for a bot."},
    },
    "oneOf": [{"required": ["webhook_url"]}, {"required": ["bot_token", "channel"]}],
    "additionalProperties": False,
}


class SlackChannel:
    """Sends notifications to Slack."""

    def __init__(self, http: ChannelHttp, egress: Egress) -> None:
        self._http, self._egress = http, egress

    def definition(self) -> ChannelType:
        """Return the definition of the channel type."""
        return ChannelType(
            type="slack",
            title="Slack",
            schema=SCHEMA,
            secrets=("webhook_url", "bot_token"),
            send=self.send,
            check=self.check,
            pace_seconds=1.0,
        )

    async def check(self, config: Mapping[str, Any]) -> Sequence[str]:
        """Raise `Invalid` if the webhook URL does not belong to Slack."""
        url = config.get("webhook_url")
        if url is None:
            return ()
        if not url.startswith(WEBHOOKS):
            raise Invalid.at("/config/webhook_url", "not_allowed", f"must begin with {WEBHOOKS}", problem="url_blocked")
        return await self._egress.check_saved_url(url, pointer="/config/webhook_url")

    async def send(self, config: Mapping[str, Any], notification: OutgoingNotification) -> SendResult:
        """Send a notification."""
        message: Json = {"text": slack_text(notification), "unfurl_links": False, "unfurl_media": False}
        if "webhook_url" in config:
            return judge_answer(await self._http.post(config["webhook_url"], msgspec.json.encode(message), {}))
        message |= {"channel": config["channel"], "mrkdwn": False, "parse": "none", "link_names": False}
        headers = {"Authorization": f"Bearer {config['bot_token']}"}
        answer = await self._http.post(API, msgspec.json.encode(message), headers)
        result = judge_answer(answer)
        return result if result.error is not None else _judge_api(answer.text)


def slack_text(notification: OutgoingNotification) -> str:
    """Return the text of a message, escaped so that text from people or agents cannot act as markup or a mention."""
    text = "\n".join(part for part in (notification.title, notification.body) if part)
    tail = f"\n{notification.url}" if notification.url else ""
    shown = without_markup(text)
    escaped = _escape(shown)
    if len(escaped) + len(tail) <= LIMIT:
        return escaped + tail
    spare = len(escaped) - len(shown)  # an escape must not be cut, so the text is cut before it is escaped
    return _escape(truncate(shown, max(1000, LIMIT - len(tail) - spare))) + tail


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _judge_api(text: str) -> SendResult:
    """Return the result that the Slack Web API reports in the body of a response with the status 200."""
    try:
        told = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        return SendResult(error="the response is not JSON")
    if told.get("ok") is True:
        return SendResult()
    error = str(told.get("error", "unknown"))[:100]
    return SendResult(error=error, permanent=error not in TEMPORARY, says_nothing=error not in TEMPORARY)
