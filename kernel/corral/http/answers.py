"""What a handler may return beside a shape or a `Page`, and the request parts it may ask for by type."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import ANONYMOUS, Entry
from corral.errors import PreconditionFailed

T = TypeVar("T")


class Wait(msgspec.Struct, frozen=True):
    """Returned by a `def` handler of a long poll: the unit ends, and the handler runs again when a topic rings or
    `until` passes.

    Topics are event names and ids of objects and actors. `until` is in epoch seconds; from then on the handler must
    answer.
    """

    topics: Sequence[str]
    until: float


class Answer(msgspec.Struct, Generic[T], kw_only=True):
    """A shape with another status or more headers than the route declares (202 instead of 200, `Location`, …)."""

    body: T
    status: int | None = None
    headers: Mapping[str, str] = {}


class Encoded(msgspec.Struct, frozen=True):
    """The JSON of the shape declared beside it (`-> TaskView | Encoded`), for answers that are kept encoded."""

    body: bytes
    id: str
    version: int
    status: int | None = None


class Text(msgspec.Struct, frozen=True):
    """A plain answer in another media type: metrics, documentation pages."""

    body: str
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = {}


class Stream(msgspec.Struct, frozen=True):
    """Bytes as they come; the unit has ended before the first one. The iterator is closed when the client leaves.

    `is_whole` is asked at the end: an answer that is not, is not kept under an `Idempotency-Key`.
    """

    chunks: AsyncIterator[bytes]
    media_type: str = "text/event-stream"
    headers: Mapping[str, str] = {}
    is_whole: Callable[[], bool] = lambda: True


class IfMatch(msgspec.Struct, frozen=True):
    """The `If-Match` of the request: `*` or nothing match any version.

    Handlers pass it to the service that knows the row.
    """

    version: int | None = None
    stale: bool = False  # a tag that no version can have

    def check(self, version: int) -> None:
        """Raise `PreconditionFailed` when the caller saw another version."""
        if self.stale or (self.version is not None and self.version != version):
            raise PreconditionFailed(
                f"The version is {version} by now; read it again and repeat the change.", current_version=version
            )


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
