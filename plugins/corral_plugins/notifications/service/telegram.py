"""Channels of the type `telegram`. Nothing in this module runs in a unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from corral_plugins.notifications.api import ChannelType, Json, OutgoingNotification, SendResult
from corral_plugins.notifications.service.http import MAX_RETRY_AFTER, ChannelHttp, HttpAnswer, judge_answer
from corral_plugins.notifications.service.plain_text import truncate_utf16, without_markup

API = "https://api.telegram.org"
LIMIT = 4096  # UTF-16 units
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "bot_token": {
            "type": "string",
            "maxLength": 100,
            "pattern": r"^[0-9]{1,20}:[A-Za-z0-9_-]{10,80}(?![\s\S])",
            "patternErrorMessage": "a token as BotFather shows it: digits, a colon, and at least 10 more characters",
            "description": "The token of the bot.",
        },
        "chat_id": {
            "type": "string",
            "maxLength": 64,
            "pattern": r"^(-?[0-9]{1,20}|@[A-Za-z0-9_]{3,60})(?![\s\S])",
            "patternErrorMessage": "the id of a chat, such as -100123456, or the name of a channel, such as @example",
            "description": "The id of the chat, or the name of a channel that begins with @.",
        },
        "message_thread_id": {"type": "integer", "minimum": 1, "description": "The topic of a forum."},
    },
    "required": ["bot_token", "chat_id"],
    "additionalProperties": False,
}


class TelegramChannel:
    """Sends notifications to Telegram, as plain text."""

    def __init__(self, http: ChannelHttp) -> None:
        self._http = http

    def definition(self) -> ChannelType:
        """Return the definition of the channel type."""
        return ChannelType(
            type="telegram",
            title="Telegram",
            schema=SCHEMA,
            secrets=("bot_token",),
            send=self.send,
            pace_seconds=1.0,
        )

    async def send(self, config: Mapping[str, Any], notification: OutgoingNotification) -> SendResult:
        """Send a notification."""
        message: Json = {
            "chat_id": config["chat_id"],
            "text": telegram_text(notification),
            "link_preview_options": {"is_disabled": True},
        }
        if "message_thread_id" in config:
            message["message_thread_id"] = config["message_thread_id"]
        url = f"{API}/bot{config['bot_token']}/sendMessage"
        answer = await self._http.post(url, msgspec.json.encode(message), {})
        result = judge_answer(answer)
        told = _requested_wait(answer)
        return result if told is None else msgspec.structs.replace(result, retry_after=told)


def telegram_text(notification: OutgoingNotification) -> str:
    """Return the text of a message, escaped so that text from people or agents cannot act as a mention."""
    text = "\n".join(part for part in (notification.title, notification.body) if part)
    return truncate_utf16(without_markup(text), LIMIT, f"\n{notification.url}" if notification.url else "")


def _requested_wait(answer: HttpAnswer) -> float | None:
    """Return the waiting time, in seconds, that the body of a response specifies, or None if it specifies none."""
    if answer.status != 429:
        return None
    try:
        told = msgspec.json.decode(answer.text, type=dict[str, Any])
        return min(float(told["parameters"]["retry_after"]), MAX_RETRY_AFTER)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None
