"""The declaration of routes: a handler's signature says what comes in, what goes out and which services it needs.

    routes = Routes("/tasks", tag="Tasks")

    @routes.post("/", needs="tasks.write", status=201, raises=("duplicate",))
    def create_task(body: NewTask, tasks: Tasks, caller: Principal) -> TaskView:
        \"\"\"Create a task and queue it.\"\"\"
        return tasks.create(body, by=caller)

Parameters, by name: `body`, `query` (shapes), path names (`str`), `caller: Principal`. By type: `IfMatch`, `Request`,
and any service. What stands for `{id}` or `{…_id}` in a path is a UUID, or the answer is 404; other names are any
segment. A `def` handler is one unit of work (GET: read-only, run again at will); an `async def` one opens its own.
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
    """A limit beside those of every request: `count` calls in `seconds`, for each client address, person or caller.

    Routes with a rate of one name share its buckets.
    """

    name: str
    count: int
    seconds: int
    per: Literal["client", "person", "caller"] = "caller"


class Route(msgspec.Struct, kw_only=True):
    """One operation, as data: the table, OpenAPI and the documentation are made of these."""

    method: str
    path: str  # below /api/v1, without a trailing slash: /tasks/{id}
    handler: Callable[..., Any]
    tag: str
    needs: tuple[str, ...]  # any one of these suffices
    status: int = 200
    also: tuple[int, ...] = ()  # further statuses of success that the handler's answer may bring
    raises: tuple[str, ...] = ()
    body_limit: int = MIB
    seconds: float = 30.0  # wall time
    lenient: bool = False  # text reported by machines is mended, not refused
    redacted: bool = False  # credentials are taken out of the body before the handler sees it
    root: bool = False  # answers at the root too (/health)
    keyed: bool = False  # `Idempotency-Key` counts: every POST, unless it shows a stored value, anew or no more
    no_store: bool = False
    limited: bool = False  # answers a session that must first change its password
    own_session: bool = False  # people who signed in themselves only: no API key, no machine
    step_up: bool = False  # the session has stepped up; an API key needs the permission among its scopes, in full
    remembered: bool = False  # answers who was known shortly before, when no database can say who calls
    exempt_host: bool = False
    rate: Rate | None = None
    live: bool = False  # the answer tells more than its version does: never 304
    rest: bool = False  # the last name of the path takes what is left of it, slashes included
    abandoned: bool = False  # an `async def` handler is cancelled when the client leaves
    delegable: bool = False  # callers may act as the principal that a delegation header names
    explain: Callable[[Problem], Mapping[str, Any]] | None = None  # further members of every problem here
    plugin: str = ""
    summary: str = ""
    description: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the route answers, without trailing slashes."""
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
        """`GET /tasks/{id}`: in logs, metrics and errors."""
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
        """A read; a `def` handler must not write."""
        return self._add("GET", path, needs, options)

    def post(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """A creation (`status=201`) or an action. `Idempotency-Key` is honoured by the request path."""
        return self._add("POST", path, needs, {"keyed": True, **options})

    def put(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """A replacement; partial bodies are taken."""
        return self._add("PUT", path, needs, options)

    def patch(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """A partial update."""
        return self._add("PATCH", path, needs, options)

    def delete(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """A deletion; 204."""
        return self._add("DELETE", path, needs, {"status": 204, **options})

    def _add(
        self, method: str, path: str, needs: str | tuple[str, ...], options: dict[str, Any]
    ) -> Callable[[Handler], Handler]:
        def declare(handler: Handler) -> Handler:
            text = inspect.getdoc(handler) or ""
            summary, _, description = text.partition("\n")
            if set("{}") & set(_NAME.sub("", self.prefix + path)):
                raise ValueError(f"{method} {self.prefix}{path}: a name in a path is {{…}} of small letters and _")
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
