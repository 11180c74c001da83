"""The responses that handlers can return, and the parts of a request that handlers can take as parameters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import UnitContext
from corral.errors import PreconditionFailed

T = TypeVar("T")


class Wait(msgspec.Struct, frozen=True):
    """The value that a `def` handler returns to make the request a long poll.

    The unit of work ends, and the handler runs again when one of the topics is notified or the time `until` is reached.
    A topic is the name of an event, or the id of an object or actor. `until` is in epoch seconds; after that time, the
    handler must return a response.
    """

    topics: Sequence[str]
    until: float


class Answer(msgspec.Struct, Generic[T], kw_only=True):
    """A response body with additional headers, or with a status that differs from the route's declared status."""

    body: T
    status: int | None = None
    headers: Mapping[str, str] = {}


class Encoded(msgspec.Struct, frozen=True):
    """A response body that is already encoded as JSON, for cached responses.

    The handler's return annotation also names the type of the body: `-> TaskView | Encoded`.
    """

    body: bytes
    id: str
    version: int
    status: int | None = None


class Text(msgspec.Struct, frozen=True):
    """A response body that is text but not JSON, such as metrics or documentation pages."""

    body: str
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = {}


class Stream(msgspec.Struct, frozen=True):
    """A streamed body. The unit of work ends before the first chunk is sent.

    `chunks` is closed when the client disconnects. `is_whole` is called at the end and returns whether the stream is
    complete. Only a complete stream is stored under an `Idempotency-Key`. In response to a `HEAD` request, only the
    headers are sent, and `chunks` is never iterated.
    """

    chunks: AsyncIterator[bytes]
    media_type: str = "text/event-stream"
    headers: Mapping[str, str] = {}
    status: int | None = None
    is_whole: Callable[[], bool] = lambda: True


class Response(msgspec.Struct):
    """The response to a request: its status, its headers, and its body as bytes or as a stream of `chunks`.

    `is_whole()` returns whether a stream was sent completely.
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}
    media_type: str = "application/json"
    chunks: AsyncIterator[bytes] | None = None
    is_whole: Callable[[], bool] = lambda: True


class IfMatch(msgspec.Struct, frozen=True):
    """The `If-Match` header of the request. If the header is missing or `*`, it matches any version.

    Handlers pass this value to the service that reads the row.
    """

    version: int | None = None
    stale: bool = False  # the header's value cannot match any version

    @classmethod
    def parse(cls, header: str | None) -> IfMatch:
        """Parse the value of the header: `"7"`, `*`, or None if the header is missing."""
        tag = "*" if header is None else header.strip()
        number = tag.strip('"')
        if number.isascii() and number.isdigit() and len(number) < 19:
            return cls(version=int(number))
        return cls(stale=tag != "*")

    def check(self, version: int) -> None:
        """Raise `PreconditionFailed` if the header specifies a version other than the current one."""
        if self.stale or (self.version is not None and self.version != version):
            detail = f"The current version is {version}; fetch the object again and repeat the change."
            raise PreconditionFailed(detail, current_version=version)


ANY_VERSION = IfMatch()


class Request(Protocol):
    """The parts of a request that a handler may read. `label` is the route, such as `GET /tasks/{id}`."""

    method: str
    path: str
    label: str
    client_ip: str
    request_id: str
    headers: Mapping[bytes, bytes]

    def header(self, name: str) -> str | None:
        """Return the value of a header, or None if it is missing. `name` is in lower case."""

    def unit_context(self, caller: Principal | None = None) -> UnitContext:
        """Return the context for units of work that an `async def` handler opens.

        The context contains the actor, the route, and the id, IP address and user agent of the request.
        """
