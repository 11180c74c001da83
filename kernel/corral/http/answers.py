"""Values that a handler may return beside a shape or a `Page`, and parts of the request that it may ask for by type."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import ANONYMOUS, Entry
from corral.errors import PreconditionFailed

T = TypeVar("T")


class Wait(msgspec.Struct, frozen=True):
    """A `def` handler returns this for a long poll: the unit ends, and the handler runs again when a topic is notified
    or `until` passes.

    Topics are event names and ids of objects and actors. `until` is in epoch seconds; after it the handler must
    return an answer.
    """

    topics: Sequence[str]
    until: float


class Answer(msgspec.Struct, Generic[T], kw_only=True):
    """A shape with another status than the route declares, or with additional headers."""

    body: T
    status: int | None = None
    headers: Mapping[str, str] = {}


class Encoded(msgspec.Struct, frozen=True):
    """The encoded JSON of the shape declared beside it (`-> TaskView | Encoded`), for answers that are cached."""

    body: bytes
    id: str
    version: int
    status: int | None = None


class Text(msgspec.Struct, frozen=True):
    """Text in another media type than JSON: metrics, documentation pages."""

    body: str
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = {}


class Stream(msgspec.Struct, frozen=True):
    """A streamed body. The unit ends before the first chunk; the iterator is closed when the client leaves.

    `is_whole` is called at the end; only a complete stream is stored under an `Idempotency-Key`.
    """

    chunks: AsyncIterator[bytes]
    media_type: str = "text/event-stream"
    headers: Mapping[str, str] = {}
    is_whole: Callable[[], bool] = lambda: True


class IfMatch(msgspec.Struct, frozen=True):
    """The `If-Match` header of the request; a missing header and `*` match any version.

    Handlers pass it on to the service that reads the row.
    """

    version: int | None = None
    stale: bool = False  # the tag has a form that matches no version

    @classmethod
    def parse(cls, header: str | None) -> IfMatch:
        """The value of a header: `"7"`, `*` or none."""
        tag = "*" if header is None else header.strip()
        number = tag.strip('"')
        if number.isascii() and number.isdigit() and len(number) < 19:
            return cls(version=int(number))
        return cls(stale=tag != "*")

    def check(self, version: int) -> None:
        """Raise `PreconditionFailed` when the caller read another version."""
        if self.stale or (self.version is not None and self.version != version):
            detail = f"The current version is {version}; read the object again and repeat the change."
            raise PreconditionFailed(detail, current_version=version)


ANY_VERSION = IfMatch()


class Request:
    """What a handler may ask for of the request itself. `label` is its route, `GET /tasks/{id}`."""

    __slots__ = ("client_ip", "headers", "label", "method", "path", "request_id")
    method: str
    path: str
    label: str
    client_ip: str
    request_id: str
    headers: Mapping[bytes, bytes]

    def header(self, name: str) -> str | None:
        """The value of a header, by its lower-case name."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin1")

    def entry(self, caller: Principal | None = None) -> Entry:
        """The entry for units that an `async def` handler opens: who acts, and from where."""
        actor = ANONYMOUS if caller is None else caller.actor
        agent = self.headers.get(b"user-agent")
        user_agent = None if agent is None else agent.decode("latin1")
        return Entry(self.label, actor, (), self.request_id, self.client_ip, user_agent)
