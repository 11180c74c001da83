"""Declarations of routes. A handler's signature states its input, its output and the services that it needs.

    routes = Routes("/tasks", tag="Tasks")

    @routes.post("/", needs="tasks.write", status=201, raises=("duplicate",))
    def create_task(body: NewTask, tasks: Tasks, caller: Principal) -> TaskView:
        \"\"\"Create a task and queue it.\"\"\"
        return tasks.create(body, by=caller)

A handler may have the parameters `body` (a msgspec struct, or `bytes` for the raw body) and `query` (a struct), the
path parameters (`str`), and parameters that are annotated with `Principal`, `IfMatch`, `Request` or the type of a
service. In a path, `{id}` and `{…_id}` match UUIDs; other names match any segment. A `def` handler runs as one unit of
work (read-only for GET) and may run more than once; an `async def` handler opens its own units of work.

The handler of a route with `multipart` reads the body while it arrives: its `body` is an `AsyncIterator[bytes]`. It
checks the media type, parses the parts and honours `Idempotency-Key` itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec

from corral.errors import Problem
from corral.http.answers import Request, Response

Handler = TypeVar("Handler", bound=Callable[..., Any])
Explain = Callable[[Problem, Request | None], Response | None]
"""A function that adds information to a problem and returns None, or returns a response to send instead.

If the request is None, the function is called to find out how the API documentation should describe the problem.
"""

API_PREFIX = "/api/v1"
MIB = 1024 * 1024
_NAME = re.compile(r"\{([a-z_]+)\}")


class Rate(msgspec.Struct, frozen=True):
    """An additional rate limit: `count` requests in `seconds`, per client address, person or caller.

    If `per` is `key`, the handler itself counts the requests with `RateLimits`, and the limit for anonymous clients
    does not apply. Routes whose rates have the same name share one limit.
    """

    name: str
    count: int
    seconds: int
    per: Literal["client", "person", "caller", "key"] = "caller"


class Route(msgspec.Struct, kw_only=True):
    """The declaration of one operation. The router, the OpenAPI document and the documentation page use it."""

    method: str
    path: str  # below /api/v1, without a trailing slash: /tasks/{id}
    handler: Callable[..., Any]
    tag: str
    needs: tuple[str, ...]  # permissions; the caller needs one of them
    status: int = 200
    also: tuple[int, ...] = ()  # additional success statuses that the handler may return
    raises: tuple[str, ...] = ()  # problem codes in addition to those that every route may return
    body_limit: int = MIB
    seconds: float = 30.0  # the time limit of an `async def` handler
    lenient: bool = False  # invalid characters in text from machines are replaced instead of refused
    redacted: bool | None = None  # whether credentials are removed from bodies; None: only from those of machines
    form: bool = False  # the body is a submitted HTML form, not JSON
    multipart: Any = None  # the body is multipart/form-data with the parts that this struct describes
    root: bool = False  # also served without /api/v1 (/health)
    keyed: bool = False  # honours `Idempotency-Key`; every POST does unless it reveals a stored value
    no_store: bool = False  # responses contain secrets: never cached, and encrypted when stored for replay
    limited: bool = False  # open to principals with restricted access, such as users who must change a password
    own_session: bool = False  # only for people who signed in: no API keys, no machines
    step_up: bool = False  # needs a recent re-authentication; an API key must name the permission among its scopes
    remembered: bool = False  # while the database is unavailable, recently authenticated callers are accepted
    exempt_host: bool = False  # accepts any `Host` header, and is served under overload
    rate: Rate | None = None
    live: bool = False  # the response may change while its version does not: never 304
    rest: bool = False  # the last name in the path matches the rest of the path, including slashes
    abandoned: bool = False  # the `async def` handler is cancelled when the client disconnects
    delegable: bool = False  # callers may act as the principal that a delegation header names
    explain: Explain | None = None  # completes or replaces every problem below the first segment of the path
    plugin: str = ""
    summary: str = ""
    description: str = ""
    signature: Any = None  # the `Signature` of the handler, which is read when the route is first bound

    @property
    def paths(self) -> tuple[str, ...]:
        """The full paths of the route: the path below `/api/v1`, and also the path at the root if `root` is set."""
        path = API_PREFIX + self.path.rstrip("/")
        return (path, self.path) if self.root else (path,)

    @property
    def path_parameters(self) -> list[str]:
        """The names of the path parameters."""
        return _NAME.findall(self.path)

    @property
    def is_async(self) -> bool:
        """Whether the handler is an `async def` function, which opens its own units of work."""
        return inspect.iscoroutinefunction(self.handler)

    @property
    def label(self) -> str:
        """The method and path, such as `GET /tasks/{id}`, for logs, metrics and errors."""
        return f"{self.method} {self.path}"


class Routes:
    """A group of routes that share a path prefix and a tag.

    The `options` of a route are fields of `Route`; `defaults` are options that apply to every route of the group.
    """

    def __init__(self, prefix: str, *, tag: str, explain: Explain | None = None, **defaults: Any) -> None:
        self.prefix, self.tag, self.defaults = prefix.rstrip("/"), tag, {"explain": explain, **defaults}
        self.routes: list[Route] = []

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)

    def get(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare a read-only operation. A `def` handler cannot write to the database."""
        return self._add("GET", path, needs, options)

    def post(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare an operation that creates an object (`status=201`) or acts on one. Supports `Idempotency-Key`."""
        return self._add("POST", path, needs, {"keyed": True, **options})

    def put(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare an operation that replaces an object or, if the body is partial, some of its fields."""
        return self._add("PUT", path, needs, options)

    def patch(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare an operation that changes some fields of an object."""
        return self._add("PATCH", path, needs, options)

    def delete(self, path: str, *, needs: str | tuple[str, ...], **options: Any) -> Callable[[Handler], Handler]:
        """Declare an operation that deletes an object. The response has status 204."""
        return self._add("DELETE", path, needs, {"status": 204, **options})

    def _add(
        self, method: str, path: str, needs: str | tuple[str, ...], options: dict[str, Any]
    ) -> Callable[[Handler], Handler]:
        def declare(handler: Handler) -> Handler:
            summary, _, description = (inspect.getdoc(handler) or "").partition("\n")
            if set("{}") & set(_NAME.sub("", self.prefix + path)):
                raise ValueError(f"{method} {self.prefix}{path}: path parameters must be lower case, as in {{task_id}}")
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


class ServedRoutes:
    """The routes that the application serves, and the ASGI application itself, for plugins that describe the API.

    Requests to `app` pass through the whole pipeline, like those of other clients. The application sets `routes` and
    `app`.
    """

    routes: Sequence[Route] = ()
    app: Any = None


class SocketConnection(Protocol):
    """A WebSocket connection. The endpoint first accepts or refuses the handshake, then exchanges messages."""

    request: Request
    query: dict[str, str]

    async def accept(self) -> None:
        """Complete the handshake."""

    async def refuse(self, problem: Problem) -> None:
        """Refuse the handshake and respond with the problem document."""

    def count_anonymous(self) -> None:
        """Count the connection against the rate limits for anonymous clients. Raise `TooMany` if a limit is exceeded.

        Call this method after the client has sent an invalid credential.
        """

    async def receive(self) -> str | bytes | None:
        """Wait for the next message and return it, or None if the client has disconnected."""

    async def send(self, text: str) -> None:
        """Send a text frame. Raise `ConnectionError` if the client has disconnected."""

    async def close(self, code: int, reason: str = "") -> None:
        """Close the connection with an RFC 6455 close code."""


class Socket(msgspec.Struct, frozen=True):
    """The declaration of a WebSocket endpoint, which is available at `path`, both below `/api/v1` and at the root.

    `serve(connection, …services)` handles one connection. It must accept or refuse the handshake itself.
    """

    path: Annotated[str, msgspec.Meta(pattern="^/")]
    serve: Callable[..., Awaitable[Any]]
