"""The plugin contract: a class whose attributes are the manifest and whose hooks return the plugin's contributions.

The kernel calls each hook once, at boot; the order of the calls is undefined. Subscribers handle an event after the
transaction that emitted it has committed. Other plugins call services directly. The hooks are specified in
`corral.hookspecs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeVar,
    _SpecialForm,
    runtime_checkable,
)

import msgspec
import pluggy

from corral.auth.principal import Permission, Principal
from corral.config.model import Config
from corral.http.client_address import is_loopback
from corral.http.routes import Rate, Route

T = TypeVar("T")
KERNEL_API = 1
hookimpl = pluggy.HookimplMarker("corral")
Protection = Literal[False, True, "essential"]
SeriesName = Annotated[str, msgspec.Meta(pattern="^[a-z_][a-z0-9_]*$")]


class Plugin:
    """Base class of all plugins.

    The first line of a plugin's class docstring is the title of the plugin; the rest is the description. The attribute
    `section` of an instance is the validated configuration section `[plugins.<name>]`, an instance of the class
    `config`.
    """

    name: ClassVar[str]
    """The identifier of the plugin. It also names the config section, and is the prefix of tables and permissions."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Plugins that must be active; otherwise this plugin is `blocked`.

    Constructors may take services of these plugins.
    """
    wants: ClassVar[tuple[str, ...]] = ()
    """Optional plugins. Their services are annotated `X | None`, and are None while the plugin is not active."""
    config: ClassVar[type[msgspec.Struct] | None] = None
    """The type of the config section `[plugins.<name>]`.

    The plugin's handlers, jobs, schedules, subscribers and services receive the section through a parameter that is
    annotated with this type.
    """
    permissions: ClassVar[Sequence[Permission]] = ()
    prefixes: ClassVar[tuple[str, ...]] = ()
    """Additional prefixes, besides the name, for the permissions, settings, jobs and tables of a built-in plugin."""
    protected: ClassVar[Protection] = False
    """If true, the plugin cannot be disabled or quarantined.

    If it is `"essential"`, the process also refuses to serve without the plugin. Only plugins in Corral's own
    distribution may be protected. Assign a literal, because the value is parsed from the source code when the plugin
    cannot be imported.
    """
    starts_first: ClassVar[bool] = False
    """Whether this plugin starts before all plugins that it does not require.

    Use it for work that must be done before other plugins write data or read settings.
    """
    kernel_api: ClassVar[int] = KERNEL_API

    def __init__(self, settings: Any = None) -> None:
        self.section = settings
        """The validated config section `[plugins.<name>]`, an instance of `config`."""

    async def start(self, runtime: Runtime) -> None:
        """Start the plugin.

        Called after boot, before the first request. If this method raises an exception, the plugin is marked as
        `failed`.
        """

    async def stop(self) -> None:
        """Stop the plugin. Called at shutdown, after the last request."""

    @classmethod
    def title(cls) -> str:
        """Return the first line of the class docstring."""
        return (inspect.getdoc(cls) or cls.name).partition("\n")[0]

    @classmethod
    def description(cls) -> str:
        """Return the class docstring without its first line."""
        return (inspect.getdoc(cls) or "").partition("\n")[2].strip()


class Runtime(Protocol):
    """The functions that a plugin can use while it is running."""

    @property
    def address(self) -> str | None:
        """The server's base URL, such as `http://127.0.0.1:8000`.

        None until the server listens, and in processes that do not serve requests.
        """
        ...

    def service(self, kind: Callable[..., T]) -> T:
        """Return a service of this plugin or of a plugin that it requires."""
        ...

    def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a background task until shutdown.

        A task that returns or raises an exception is restarted with backoff (1 s to 60 s).
        """
        ...

    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None:
        """Call `run(address)` as soon as the server accepts connections.

        A process that does not serve requests never calls `run`.
        """
        ...

    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None:
        """Call `run` at shutdown while the server still answers requests. The call has a time limit."""
        ...


class InstallationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the operator's configuration that plugins may read. The kernel provides it as a service.

    `secrets` maps `<NAME>` to the value of the `CORRAL_SECRET_<NAME>` variable. `processes` is the number of server
    processes. `is_public` is true if the server listens on an address other than loopback. `bootstrap_admin` contains
    the email address and password of the admin account that is created if no admin exists.
    """

    data_dir: Path
    local_model: Path | None = None
    plugin_dir: Path | None = None
    secrets: Mapping[str, str] = {}
    processes: int = 1
    bind: str = ""
    public_url: str | None = None
    has_tls: bool = False
    redis_url: str | None = None
    jwt_secret: str | None = None
    metrics_token: str | None = None
    bootstrap_admin: tuple[str, str] | None = None
    safe_mode: bool = False
    is_synchronous_normal: bool = False
    rate_limits: bool = True
    ip_rules_disabled: bool = False
    is_public: bool = False
    key_in_data_dir: bool = False

    def __repr__(self) -> str:  # the fields include secrets, and a repr may be logged
        return f"<InstallationConfig {self.data_dir}>"

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """Return the part of the operator's configuration that plugins may read."""
        email, password = config.bootstrap_admin_email, config.bootstrap_admin_password
        same = ("data_dir", "local_model", "secrets", "metrics_token", "safe_mode", "rate_limits", "ip_rules_disabled")
        return cls(
            **{name: getattr(config, name) for name in same},
            **{name: getattr(config.server, name) for name in ("bind", "processes", "public_url")},
            has_tls=config.server.certfile is not None,
            redis_url=config.redis.url,
            jwt_secret=config.keys.jwt_secret,
            bootstrap_admin=(email, password) if email and password else None,
            is_synchronous_normal=config.database.synchronous == "normal" and config.database.is_file,
            is_public=not is_loopback(config.server.bind.rpartition(":")[0]),
            key_in_data_dir=config.keys.master_key is None,
        )

    @classmethod
    def load(cls, config_path: Path | None = None) -> Self:
        """Load the configuration in the same way as `corral serve`, for commands that run without a kernel.

        Raise `StartupError` if the configuration is invalid.
        """
        from corral.config.reader import load as load_config

        return cls.from_config(load_config(path=config_path))


class CommandSession(Protocol):
    """Gives a command on the server's machine access to the services of a kernel. See `OpenSession`."""

    caller: Principal

    def service(self, kind: Callable[..., T]) -> T:
        """Return the service of the given type."""
        ...

    def run(self, fn: Callable[[], T], *, read: bool = False) -> T:
        """Run `fn` as one unit of work with the operating-system user as the actor, and wait for its COMMIT."""
        ...


OpenSession = Callable[[Path | None, str], AbstractContextManager[CommandSession]]
"""The type of the object in the click context of every command (`@click.pass_obj`).

Use it as `with open_session(path, label) as session`. It boots a kernel that uses the installation's own database, even
while the server is running. It raises `StartupError`, which commands must not catch.
"""


class Provide(msgspec.Struct, frozen=True):
    """Declares a service: `Provide(Tasks, TasksService)` injects one shared instance wherever `Tasks` is requested.

    Constructor parameters of `factory` are services of the kernel, of this plugin and of the plugins in its `requires`.
    Class attributes annotated `X | None` receive the services of the plugins in `wants`, or None if the plugin is not
    active. These attributes are set after all services have been created.
    """

    kind: type[Any]
    factory: Callable[..., Any]


class Settings(Protocol):
    """Reads the current values of settings.

    The environment and the configuration file override stored values, which override defaults.
    """

    def get(self, setting: Setting[T]) -> T: ...


class Setting(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A declared run-time setting `category.key`. `kind` is the Python type; `null` is allowed if the default is None.

    `minimum` and `maximum` limit a number, or the length of a string or list. `check(value, settings)` performs
    additional validation, for example of the value's relation to other settings. It returns None for a valid value.
    Otherwise, it describes the problem as the end of a sentence that begins with `category.key`. Set `own_session` if
    the setting can weaken a safeguard: a person who has signed in may then change it, but an API key may not.
    """

    name: str
    if TYPE_CHECKING:  # type checkers infer `Setting[str | None]` from `kind=str, default=None`
        kind: type[T] | UnionType | _SpecialForm
    else:
        kind: Any
    default: T
    title: str
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None  # must match the whole text, or each text of a list
    accepts: str = ""  # what the pattern accepts, in words, for errors
    check: Callable[[Any, Settings], str | None] | None = None
    env: str = ""  # the environment variable `CORRAL_…` that pins the setting
    restart_required: bool = False
    secret: bool = False
    own_session: bool = False


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the audit log, written in the same transaction as the change.

    Its actor is the actor of the unit of work.

    `action` has the form `<area>.<noun>.<verb>`. `changes` maps a field to `(from, to)`; use `SECRET_CHANGE` for a
    secret field. `details` contains further facts for auditors, but never request bodies. `changes` and `details` are
    redacted. `code` is the reason for an `outcome` other than `success`.
    """

    action: str
    object_type: str
    object_id: str | None
    object_name: str | None = None
    outcome: Literal["success", "denied", "failed"] = "success"
    code: str | None = None
    changes: Mapping[str, tuple[Any, Any]] = {}
    details: Mapping[str, Any] = {}


SECRET_CHANGE = (None, "changed")


class Audit(Protocol):
    """Records privileged changes in the audit log. The `audit` plugin provides this service."""

    @property
    def verbose(self) -> bool:
        """Whether the audit log records every request, not only privileged changes."""
        ...

    def record(self, entry: AuditEntry) -> None:
        """Add an audit row to the current unit of work.

        Raise `Unavailable(audit_unavailable)` if the row cannot be written.
        """
        ...

    def record_request(self, route: Route, path: str, status: int, code: str | None) -> None:
        """Add an audit row for a request that was answered with `status`.

        `code` is the problem code of a failed request.
        """
        ...


class ApiDocument(Protocol):
    """The OpenAPI document of the application. The `plugin_admin` plugin provides this service."""

    def render(self) -> bytes:
        """Return the document as JSON."""
        ...


class MailProbe(Protocol):
    """Tests the mail server, for `corral doctor`. The `accounts` plugin provides this service."""

    async def probe(self) -> str | None:
        """Connect to the mail server and sign in, without sending mail. Return the error, or None."""
        ...


class FirstAccount(Protocol):
    """Tells the operator how to create the first account. The `accounts` plugin provides this service."""

    async def instructions(self) -> str | None:
        """Return the instructions for creating the first account. The server prints them at startup.

        Return None if an admin exists.
        """
        ...


class Contributions(Protocol):
    """Gives a plugin access to the items that active plugins contribute to the plugin's hooks.

    Call `for_hook` when the contributions are needed, not while services are being constructed.
    """

    def for_hook(self, hook: str) -> list[tuple[str, Any]]:
        """Return `(plugin, item)` for each item that an active plugin contributed to a hook."""
        ...


class HealthCheck(msgspec.Struct, frozen=True):
    """A health check of a dependency. Its result is shown at `/settings/health`.

    `check` takes no arguments and returns `(status, sentence)`. It runs in a thread for at most 2 s. The status is
    `ok`, `degraded`, `down`, or `disabled` if the dependency is not configured. Any other status counts as `down`.
    """

    name: str
    check: Callable[[], tuple[str, str]]


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A metric that is read at scrape time.

    `collect` receives services as arguments, runs in a read-only unit of work, and returns `{label values: number}`.
    `labels` lists the allowed values of each label; other values are counted as `other`. Counters and histograms
    (`corral.metrics.histogram.Histogram`) belong to one process, and are summed over all processes that serve the same
    address. A gauge describes the whole installation, or only this process if `of_process` is true.
    """

    name: SeriesName
    help: str
    kind: Literal["gauge", "counter", "histogram"] = "gauge"
    of_process: bool = False
    labels: Mapping[SeriesName, Sequence[str]] = {}
    collect: Callable[..., Mapping[tuple[str, ...], Any]]


@runtime_checkable
class Gate(Protocol):
    """A check that runs on every request before its route is looked up. Raises a `Problem` to refuse the request."""

    def check(self, client_ip: str, method: str, path: str) -> None:
        """Check a request.

        Called on the event loop, so it must not perform I/O. Open WebSockets and streams are checked again every
        second.
        """
        ...


class RateLimitQuota(NamedTuple):
    """The remaining quota of a rate limit after a request.

    If several limits apply, the `RateLimit-*` headers report the one closest to exhaustion.
    """

    limit: int
    remaining: int
    reset_seconds: int


@runtime_checkable
class RateLimiter(Protocol):
    """Counts requests and enforces rate limits by raising `TooMany`.

    The methods are called on the event loop, so they must not perform I/O.
    """

    def arrive(self, client_ip: str, route: Route | None, *, anonymous: bool) -> RateLimitQuota | None:
        """Count a request before its caller is known. `route` is None if no route matches.

        `anonymous` is true if the request has no credential or its route needs none. Other requests are counted here
        only if the rate limit of their route applies per client (`per="client"`).
        """
        ...

    def enter(self, caller: Principal, route: Route, client_ip: str) -> RateLimitQuota | None:
        """Count a request from an authenticated caller.

        If this method returns without an error, `leave` is called when the response is ready.
        """
        ...

    def leave(self, caller: Principal) -> None:
        """Record that a request of the caller is no longer in flight.

        This method is called when the response is ready or, for a stream, when the stream begins.
        """
        ...


class RateLimits(Protocol):
    """Rate limits that a handler enforces itself, because only the handler knows the key by which requests are counted.

    The `security` plugin provides this service.
    """

    def take(self, rate: Rate, key: str) -> None:
        """Count one request towards the limit for `key`. Raise `TooMany` if the request exceeds the limit.

        Call this method on the event loop, before the unit of work.
        """
        ...
