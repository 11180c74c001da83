"""Channel types for a fixed list of additional services that Apprise supports. They require the extra `notify`.

Apprise sends requests with the blocking library `requests`, which does not use the egress guard. In each Apprise module
used here, `GuardedRequests` therefore replaces that library. `GuardedRequests` passes a request to Corral's guarded
client if the request goes to the address of the service, and refuses every other request. Nothing in this module runs
in a unit of work.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec

from corral.errors import Invalid
from corral_plugins.notifications.api import ChannelType, Json, OutgoingNotification, SendResult
from corral_plugins.notifications.service.http import TOTAL_SECONDS, ChannelHttp, HttpAnswer, judge_answer
from corral_plugins.notifications.service.plain_text import truncate_utf16, without_markup

LIBRARY = "apprise"
NOT_CONFIGURED = "Apprise does not accept these values. Compare the values with those that the service shows."


def _token_schema(
    description: str, pattern: str = r"[A-Za-z0-9_-]{10,200}", expected: str = "10 to 200 letters, digits, _ and -"
) -> Json:
    return {
        "type": "string",
        "pattern": rf"^{pattern}(?![\s\S])",
        "patternErrorMessage": expected,
        "maxLength": 200,
        "description": description,
    }


class AppriseService(msgspec.Struct, frozen=True, kw_only=True):
    """A service that Apprise supports. `address` is the beginning of every URL of the service.

    `fixed` contains constructor arguments of the Apprise class that are not members of the config. The service accepts
    messages of at most `limit` UTF-16 units.
    """

    type: str
    title: str
    module: str
    name: str
    address: str
    members: Mapping[str, Json]
    secrets: tuple[str, ...]
    limit: int
    fixed: Mapping[str, Any] = {}


SERVICES: tuple[AppriseService, ...] = (
    AppriseService(
        type="discord",
        title="Discord",
        module="discord",
        name="NotifyDiscord",
        address="https://discord.com/api/webhooks/",
        members={
            "webhook_id": _token_schema("The number in the URL of the webhook.", r"[0-9]{5,30}", "5 to 30 digits"),
            "webhook_token": _token_schema("The part of the webhook's URL after the number."),
        },
        secrets=("webhook_token",),
        limit=2000,
        fixed={"avatar": False},
    ),
    AppriseService(
        type="google_chat",
        title="Google Chat",
        module="google_chat",
        name="NotifyGoogleChat",
        address="https://chat.googleapis.com/v1/spaces/",
        members={
            "workspace": _token_schema(
                "The space: the part of the webhook's URL after spaces/.",
                r"[A-Za-z0-9_-]{2,100}",
                "2 to 100 letters, digits, _ and -",
            ),
            "webhook_key": _token_schema("The key in the URL of the webhook."),
            "webhook_token": _token_schema(
                "The token in the URL of the webhook.",
                r"[A-Za-z0-9_%=-]{10,200}",
                "10 to 200 letters, digits, _, %, = and -",
            ),
        },
        secrets=("webhook_key", "webhook_token"),
        limit=4000,
    ),
    AppriseService(
        type="ntfy",
        title="ntfy.sh",
        module="ntfy",
        name="NotifyNtfy",
        address="https://ntfy.sh",
        members={
            "targets": _token_schema(
                "The topic. Everyone who knows the topic can read its messages.",
                r"[A-Za-z0-9_-]{1,64}",
                "1 to 64 letters, digits, _ and -",
            )
        },
        secrets=("targets",),
        limit=4000,
        fixed={"mode": "cloud", "include_image": False},
    ),
    AppriseService(
        type="pushover",
        title="Pushover",
        module="pushover",
        name="NotifyPushover",
        address="https://api.pushover.net/1/messages.json",
        members={
            "user_key": _token_schema("The key of the user or group.", r"[A-Za-z0-9]{30}", "30 letters and digits"),
            "token": _token_schema("The token of the application.", r"[A-Za-z0-9]{30}", "30 letters and digits"),
        },
        secrets=("user_key", "token"),
        limit=1024,
    ),
    AppriseService(
        type="webex",
        title="Webex",
        module="webexteams",
        name="NotifyWebexTeams",
        address="https://webexapis.com/v1/messages",
        members={
            "access_token": _token_schema("The access token of the bot."),
            "targets": _token_schema("The id of the room."),
        },
        secrets=("access_token",),
        limit=7000,
        fixed={"mode": "bot"},
    ),
)


class AppriseChannelTypes:
    """The channel types for services that Apprise supports. The plugin sets `http`, the client that sends requests."""

    http: ChannelHttp | None = None

    def definitions(self) -> list[ChannelType]:
        """Return the definitions of all types, or none if the extra `notify` is not installed."""
        if importlib.util.find_spec(LIBRARY) is None:
            return []
        return [
            ChannelType(
                type=service.type,
                title=service.title,
                schema=_schema_of(service),
                secrets=service.secrets,
                send=functools.partial(self._send, service),
                check=functools.partial(_check, service),
                pace_seconds=1.0,
            )
            for service in SERVICES
        ]

    async def _send(
        self, service: AppriseService, config: Mapping[str, Any], notification: OutgoingNotification
    ) -> SendResult:
        """Send a notification.

        The result depends on the service's response or, if there is none, on the result that Apprise reports.
        """
        assert self.http is not None
        call = _Call(http=self.http, loop=asyncio.get_running_loop(), address=service.address)
        is_sent = await asyncio.to_thread(_notify, service, dict(config), text_for(service, notification), call)
        if call.answer is not None:
            return judge_answer(call.answer)
        return SendResult() if is_sent else SendResult(error="Apprise could not send the message; see the log.")


def text_for(service: AppriseService, notification: OutgoingNotification) -> str:
    """Return the text of a message, escaped so that text from people or agents cannot act as a mention or a link."""
    text = "\n".join(part for part in (notification.title, notification.body) if part)
    return truncate_utf16(without_markup(text), service.limit, f"\n{notification.url}" if notification.url else "")


class _Call:
    """A notification that Apprise is sending, and the latest response of the service."""

    def __init__(self, *, http: ChannelHttp, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self._http, self._loop, self._address = http, loop, address
        self.answer: HttpAnswer | None = None

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> HttpAnswer:
        """Send a request from the thread in which Apprise runs, and wait for the response."""
        if url.startswith(self._address):
            sending = self._http.post(url, body, headers, content_type=headers.get("Content-Type"))
            self.answer = asyncio.run_coroutine_threadsafe(sending, self._loop).result(TOTAL_SECONDS * 2)
        else:
            self.answer = HttpAnswer(failure=SendResult(error="blocked", says_nothing=True))
        return self.answer


_current: ContextVar[_Call | None] = ContextVar("notification_call", default=None)


class GuardedRequests:
    """Replaces the library `requests` in an Apprise module.

    It can only send POST requests, and sends them through the egress guard.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.codes, self.RequestException = library.codes, library.RequestException

    def post(self, url: str, **options: Any) -> Any:
        """Send a POST request and return the response. Raise `RequestException` if the request fails."""
        taken = {name: options.get(name) for name in ("params", "data", "json", "headers", "auth")}
        call = _current.get()
        if call is None or options.get("files"):
            raise self.RequestException("Corral sends text messages only, and each in its own call.")
        request = self._library.Request("POST", url, **taken).prepare()
        body = request.body.encode() if isinstance(request.body, str) else request.body or b""
        headers = {
            name: value for name, value in request.headers.items() if name not in ("Content-Length", "User-Agent")
        }
        answer = call.post(str(request.url), body, headers)
        if answer.failure is not None or not 200 <= answer.status < 300:
            raise self.RequestException("The service did not accept the message.")
        response = self._library.Response()
        response.status_code, response._content, response.url = answer.status, answer.text.encode(), request.url
        return response


def _notify(service: AppriseService, config: dict[str, Any], text: str, call: _Call) -> bool:
    """Send a message with Apprise. Runs in a separate thread."""
    plain = importlib.import_module(LIBRARY).NotifyFormat.TEXT
    _current.set(call)
    return bool(_create_apprise_object(service, config).notify(body=text, title="", body_format=plain))


def _create_apprise_object(service: AppriseService, config: Mapping[str, Any]) -> Any:
    """Return an Apprise object that sends with the given config. Raise `TypeError` if Apprise rejects the config."""
    library = importlib.import_module(LIBRARY)
    module = importlib.import_module(f"{LIBRARY}.plugins.{service.module}")
    if not isinstance(module.requests, GuardedRequests):
        vars(module)["requests"] = GuardedRequests(module.requests)
    asset = library.AppriseAsset(
        app_id="Corral",
        app_desc="Corral",
        secure_logging=True,
        async_mode=False,
        storage_mode=library.PersistentStoreMode.MEMORY,
    )
    make: Callable[..., Any] = getattr(module, service.name)
    return make(asset=asset, **service.fixed, **config)


async def _check(service: AppriseService, config: Mapping[str, Any]) -> Sequence[str]:
    """Raise `Invalid` if Apprise rejects the config. Nothing is sent."""
    try:
        await asyncio.to_thread(_create_apprise_object, service, config)
    except TypeError:
        raise Invalid.at("/config", "invalid_value", NOT_CONFIGURED) from None
    return ()


def _schema_of(service: AppriseService) -> Json:
    return {
        "type": "object",
        "properties": dict(service.members),
        "required": list(service.members),
        "additionalProperties": False,
    }
