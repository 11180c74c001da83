"""The declaration of routes: a handler's signature states its input, its output and the services that it needs.

    routes = Routes("/tasks", tag="Tasks")

    @routes.post("/", needs="tasks.write", status=201, raises=("duplicate",))
    def create_task(body: NewTask, tasks: Tasks, caller: Principal) -> TaskView:
        \"\"\"Create a task and queue it.\"\"\"
        return tasks.create(body, by=caller)

Parameters are `body` and `query` (shapes), the names in the path (`str`), and by type `Principal`, `IfMatch`,
`Request` and any service. `{id}` and `{…_id}` in a path stand for UUIDs, other names for any segment. A `def` handler
is one unit of work, which may run again (GET: read-only); an `async def` handler opens its own units.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from corral.errors import Problem
from corral.http.answers import Request

Handler = TypeVar("Handler", bound=Callable[..., Any])

API_PREFIX = "/api/v1"
MIB = 1024 * 1024
_NAME = re.compile(r"\{([a-z_]+)\}")


class Rate(msgspec.Struct, frozen=True):
    """An additional rate limit: `count` requests in `seconds`, per client address, person or caller.

    Routes whose rates have the same name share the limit.
    """

    name: str
    count: int
    seconds: int
    per: Literal["client", "person", "caller"] = "caller"


class Route(msgspec.Struct, kw_only=True):
    """One operation, as data: the router, the OpenAPI document and the documentation page are made from routes."""

    method: str
    path: str  # below /api/v1, without a trailing slash: /tasks/{id}
    handler: Callable[..., Any]
    tag: str
    needs: tuple[str, ...]  # permissions; one of them suffices
    status: int = 200
    also: tuple[int, ...] = ()  # further success statuses that the handler may answer with
    raises: tuple[str, ...] = ()  # problem codes beyond those that every route may answer
    body_limit: int = MIB
    seconds: float = 30.0  # the time limit of an `async def` handler
    lenient: bool = False  # invalid characters in text from machines are replaced instead of refused
    redacted: bool = False  # credentials are removed from the body before the handler sees it
    root: bool = False  # served at the root as well (/health)
    keyed: bool = False  # honours `Idempotency-Key`; every POST does unless it reveals a stored value
    no_store: bool = False  # responses contain secrets: not cached, and encrypted where they are stored for replay
    limited: bool = False  # open to principals that must do something first, such as change a password
    own_session: bool = False  # only for people who signed in: no API keys, no machines
    step_up: bool = False  # needs a recent re-authentication; an API key must name the permission among its scopes
    remembered: bool = False  # while the database is unavailable, recently authenticated callers are accepted
    exempt_host: bool = False  # answers to any `Host`, and under overload too
    rate: Rate | None = None
    live: bool = False  # the answer changes without its version: never 304
    rest: bool = False  # the last name in the path takes the rest of the path, slashes included
    abandoned: bool = False  # an `async def` handler is cancelled when the client leaves
    delegable: bool = False  # callers may act as the principal that a delegation header names
    explain: Callable[[Problem], Mapping[str, Any]] | None = None  # additional members of every problem document
    plugin: str = ""
    summary: str = ""
    description: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The full paths of the route, without trailing slashes."""
        path = API_PREFIX + self.path.rstrip("/")
        return (path, self.path) if self.root else (path,)

    @property
    def names(self) -> list[str]:
        """The names in the path."""
        return _NAME.findall(self.path)

    @property
    def is_async(self) -> bool:
        """Whether the handler opens its own units."""
        return inspect.iscoroutinefunction(self.handler)

    @property
    def label(self) -> str:
        """`GET /tasks/{id}`, for logs, metrics and errors."""
        return f"{self.method} {self.path}"


class Routes:
    """A group of routes under one prefix and tag.

    The `options` of a route are the fields of `Route`; `defaults` are options of every route of the group.
    """

    def __init__(self, prefix: str, *, tag: str, **defaults: Any) -> None:
        self.prefix, self.tag, self.defaults = prefix.rstrip("/"), tag, defaults
        self.routes: list[Route] = []

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def get(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare a read; a `def` handler must not write."""
        return self._add("GET", path, needs, options)

    def post(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare a creation (`status=201`) or an action. The request path honours `Idempotency-Key`."""
        return self._add("POST", path, needs, {"keyed": True, **options})

    def put(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare a replacement; partial bodies are accepted."""
        return self._add("PUT", path, needs, options)

    def patch(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare a partial update."""
        return self._add("PATCH", path, needs, options)

    def delete(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare a deletion, answered with 204."""
        return self._add("DELETE", path, needs, {"status": 204, **options})

    def _add(
        self, method: str, path: str, needs: str | tuple[str, ...], options: dict[str, Any]
    ) -> Callable[[Handler], Handler]:
        def declare(handler: Handler) -> Handler:
            text = inspect.getdoc(handler) or ""
            summary, _, description = text.partition("\n")
            if set("{}") & set(_NAME.sub("", self.prefix + path)):
                raise ValueError(f"{method} {self.prefix}{path}: names in a path have the form {{lower_case}}")
            route = Route(
                method=method,
                path=(self.prefix + path).rstrip("/") or "/",
                handler=handler,
                tag=self.tag,
                needs=(needs,) if isinstance(needs, str) else tuple(needs),
                summary=summary,
                description=description.strip(),
                **{**self.defaults, **options},
            )
            self.routes.append(route)
            return handler

        return declare


class SocketConnection(Protocol):
    """A WebSocket: an open handshake to be accepted or refused, then messages both ways."""

    request: Request
    query: dict[str, str]

    async def accept(self) -> None:
        """Complete the handshake."""
        ...

    async def refuse(self, problem: Problem) -> None:
        """Refuse the handshake with the document of a problem."""
        ...

    def count_anonymous(self) -> None:
        """Count an invalid credential as if none had been sent. Raises `TooMany`."""
        ...

    async def receive(self) -> str | bytes | None:
        """The next message; None when the client has gone."""
        ...

    async def send(self, text: str) -> None:
        """Send a text frame; raises `ConnectionError` when the client has gone."""
        ...

    async def close(self, code: int, reason: str = "") -> None:
        """Close with a code of RFC 6455."""
        ...


class Socket(msgspec.Struct, frozen=True):
    """A WebSocket endpoint `serve(connection, …services)`, below `/api/v1` and at the root.

    The endpoint itself accepts, refuses and closes the connection.
    """

    path: Annotated[str, msgspec.Meta(pattern="^/")]
    serve: Callable[..., Awaitable[Any]]
