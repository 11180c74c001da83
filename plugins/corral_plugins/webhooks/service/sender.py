"""Sends a signed request to a receiver, and returns the result. Nothing in this module runs in a unit of work."""

from __future__ import annotations

import contextlib
import functools
import ssl
import time
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from corral import clock
from corral.crypto import InvalidSealedValue
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked, Policy, read_url
from corral.egress.resolver import Unresolved
from corral.errors import Problem
from corral.redact.redactor import Redactor
from corral.schema.conversion import encode
from corral_plugins.circuit_breakers.api import Breakers, Verdict, judge_status
from corral_plugins.webhooks.api import connection_error_text
from corral_plugins.webhooks.models import Webhook
from corral_plugins.webhooks.service.claims import BREAKER, breaker_name
from corral_plugins.webhooks.service.credentials import WebhookCredentials
from corral_plugins.webhooks.service.signing import StandardSigner
from corral_plugins.webhooks.shapes import AttemptError

if TYPE_CHECKING:
    import httpx2

SINK = "webhook"
UNREADABLE = "Not sent: the stored secret or headers cannot be decrypted; set them again."
CONNECT_SECONDS = 5.0
MAX_RESPONSE, SHOWN_RESPONSE = 64 * 1024, 1024
MAX_RETRY_AFTER = 86_400.0
RETRY_AFTER_STATUSES = (429, 503)


class AttemptResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an attempt.

    `retry_after` is the number of seconds that the receiver asked Corral to wait, or None if it asked for no delay.
    """

    status_code: int | None = None
    error: AttemptError | None = None
    duration_ms: int = 0
    response: str | None = None
    retry_after: float | None = None

    @property
    def is_success(self) -> bool:
        """Whether the receiver accepted the message."""
        return self.error is None


class WebhookSender:
    """Sends messages. If the host's circuit breaker is open, `CircuitOpen` is raised and nothing is sent."""

    breakers: Breakers | None

    def __init__(
        self, egress: Egress, redactor: Redactor, credentials: WebhookCredentials, signer: StandardSigner
    ) -> None:
        self._egress, self._redactor, self._credentials, self._signer = egress, redactor, credentials, signer

    def declare(self, hosts: Any) -> None:
        """Declare the circuit breakers of the hosts. `hosts()` returns the hosts, and is called in a unit of work."""
        if self.breakers is not None:
            self.breakers.declare(BREAKER, lambda: [breaker_name(host) for host in hosts()])

    async def send(self, row: Webhook, *, message_id: str, payload: str, timeout_seconds: int) -> AttemptResult:
        """Send a message, and return the result of the attempt."""
        call = functools.partial(self._attempt, row, message_id, payload, timeout_seconds)
        if self.breakers is None:
            return await call()
        return await self.breakers.guard(breaker_name(row.host), call, judge=_judge)

    async def _attempt(self, row: Webhook, message_id: str, payload: str, timeout_seconds: int) -> AttemptResult:
        began = time.monotonic()
        result = await self._post(row, message_id, payload, timeout_seconds)
        return msgspec.structs.replace(result, duration_ms=round((time.monotonic() - began) * 1000))

    async def _post(self, row: Webhook, message_id: str, payload: str, timeout_seconds: int) -> AttemptResult:
        import httpx2

        body = encode(self._redactor.redact_json(msgspec.json.decode(payload), patterns=False))
        connect_seconds = min(CONNECT_SECONDS, timeout_seconds)
        try:
            async with self._egress.client(
                SINK, connect_seconds=connect_seconds, total_seconds=timeout_seconds, max_bytes=MAX_RESPONSE
            ) as client:
                response = await client.post(row.url, content=body, headers=self._headers(row, message_id, body))
        except InvalidSealedValue:  # counts as a failure, or it would be tried again for ever
            return AttemptResult(error="blocked", response=UNREADABLE)
        except (EgressBlocked, httpx2.InvalidURL) as error:
            return AttemptResult(error="blocked", response=f"Not sent: {error}")
        except httpx2.ConnectTimeout as error:
            return AttemptResult(error="connect", response=f"Not sent: {error}")
        except (httpx2.TimeoutException, TimeoutError):
            late = f"{row.host} did not answer within {timeout_seconds} s."
            return AttemptResult(error="timeout", response=late)
        except httpx2.HTTPError as error:
            kind = await self._connection_error(row.url, error)
            return AttemptResult(error=kind, response=f"Not sent: {connection_error_text(error)}")
        return AttemptResult(
            status_code=response.status_code,
            error=None if response.is_success else "status",
            response=self._redactor.redact(_response_start(response.content)),
            retry_after=_retry_after(response),
        )

    def _headers(self, row: Webhook, message_id: str, body: bytes) -> httpx2.Headers:
        import httpx2

        headers = httpx2.Headers({"User-Agent": _user_agent()})
        headers.update(self._credentials.headers(row))
        headers["Content-Type"] = "application/json"
        secrets, timestamp = self._credentials.secrets(row), int(clock.system_time_s())
        headers.update(self._signer.sign(*secrets, message_id=message_id, timestamp=timestamp, body=body))
        return headers

    async def _connection_error(self, url: str, error: BaseException) -> AttemptError:
        """Return the reason why a connection failed.

        The host name is looked up again, so that a failed lookup can be reported as `dns`.
        """
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLError):
                return "tls"
            cause = cause.__cause__ or cause.__context__
        target = read_url(url)
        with contextlib.suppress(EgressBlocked):
            try:
                await self._egress.addresses(target.host, target.port, Policy())
            except Unresolved:
                return "dns"
        return "connect"


@functools.cache
def _user_agent() -> str:
    return f"Corral/{version('corral')}"


def _judge(outcome: Any) -> Verdict:
    """Classify an attempt for the circuit breaker. Requests that Corral itself refused to send do not count."""
    if isinstance(outcome, Problem) or (isinstance(outcome, AttemptResult) and outcome.error == "blocked"):
        return "neutral"
    if isinstance(outcome, AttemptResult):
        return "failure" if outcome.status_code is None else judge_status(outcome.status_code)
    return "failure"


def _response_start(content: bytes) -> str:
    """Return the beginning of a response as text. NUL characters, which PostgreSQL cannot store, are replaced.

    The response is decoded as UTF-8. The declared character set is ignored, because it could name any codec.
    """
    return content[: 4 * SHOWN_RESPONSE].decode(errors="replace").replace("\0", "\ufffd")[:SHOWN_RESPONSE]


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the number of seconds that the receiver asks Corral to wait, limited to one day.

    Return None if the receiver asks for no delay.
    """
    told = response.headers.get("retry-after", "").strip()
    if response.status_code not in RETRY_AFTER_STATUSES or not told:
        return None
    if told.isascii() and told.isdigit():
        seconds = float(told[:9])
    else:
        try:
            seconds = parsedate_to_datetime(told).timestamp() - clock.system_time_s()
        except (ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER)
