"""Sends HTTP requests for channels, and classifies the responses. Nothing in this module runs in a unit of work."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec

from corral import clock
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.redact.redactor import Redactor
from corral_plugins.notifications.api import SendResult
from corral_plugins.webhooks.api import connection_error_text

if TYPE_CHECKING:
    import httpx2

SINK = "channel"
CONNECT_SECONDS, TOTAL_SECONDS = 5.0, 15.0
MAX_RESPONSE, SHOWN_RESPONSE = 64 * 1024, 200
MAX_RETRY_AFTER = 86_400.0
REPEATED_STATUSES = frozenset({408, 425, 429})


class HttpAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The response of a service, or the reason why there is no response."""

    status: int = 0
    text: str = ""
    retry_after: float | None = None
    failure: SendResult | None = None


class ChannelHttp:
    """Posts messages through the egress guard. The text of each response is redacted."""

    def __init__(self, egress: Egress, redactor: Redactor) -> None:
        self._egress, self._redactor = egress, redactor

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, content_type: str | None = None
    ) -> HttpAnswer:
        """Post a body, as JSON by default, and return the response."""
        import httpx2

        sent = httpx2.Headers({"User-Agent": _user_agent()})
        sent.update(headers)
        sent["Content-Type"] = content_type or "application/json"
        try:
            async with self._egress.client(
                SINK, connect_seconds=CONNECT_SECONDS, total_seconds=TOTAL_SECONDS, max_bytes=MAX_RESPONSE
            ) as client:
                response = await client.post(url, content=body, headers=sent)
        except (EgressBlocked, httpx2.InvalidURL):
            return HttpAnswer(failure=SendResult(error="blocked", says_nothing=True))
        except (httpx2.TimeoutException, TimeoutError) as error:
            late = f"{httpx2.URL(url).host} did not answer within {TOTAL_SECONDS:g} s"
            return HttpAnswer(failure=SendResult(error=f"timeout: {str(error) or late}"))
        except httpx2.HTTPError as error:
            return HttpAnswer(failure=SendResult(error=f"connect: {connection_error_text(error)}"))
        text = self._redactor.redact(response.content.decode(errors="replace"))
        return HttpAnswer(status=response.status_code, text=text, retry_after=_retry_after(response))


def judge_answer(answer: HttpAnswer) -> SendResult:
    """Return the result of an attempt, based on the status of the response."""
    if answer.failure is not None:
        return answer.failure
    if 200 <= answer.status < 300:
        return SendResult()
    again = answer.status in REPEATED_STATUSES or answer.status >= 500
    detail = " ".join(answer.text.split())[:SHOWN_RESPONSE]
    return SendResult(
        error=f"status {answer.status}" + (f": {detail}" if detail else ""),
        permanent=not again,
        retry_after=answer.retry_after,
        says_nothing=not again,
    )


@functools.cache
def _user_agent() -> str:
    return f"Corral/{version('corral')}"


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the number of seconds (at most a day) that a service asks to wait, or None if it does not ask."""
    told = response.headers.get("retry-after", "").strip()
    if response.status_code not in (429, 503) or not told:
        return None
    if told.isascii() and told.isdigit():
        seconds = float(told[:9])
    else:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - clock.system_time_s()
        except (ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER)
