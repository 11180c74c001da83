"""The contract of a plugin: one class with a manifest (class attributes) and hook implementations that contribute.

Hooks contribute once, at boot, in any order; events react after commit; services answer. See `corral.hookspecs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

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
    """Base of every plugin. The first line of the class docstring is its title, the rest its description."""

    name: ClassVar[str]
    """Identifier: config section, table prefix and permission prefix."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Plugins that must be active, else this one is `blocked`; their services come by constructor."""
    wants: ClassVar[tuple[str, ...]] = ()
    """Plugins whose services are used if active; they arrive as `X | None`."""
    config: ClassVar[type[msgspec.Struct] | None] = None
    """Shape of `[plugins.<name>]`."""
    permissions: ClassVar[Sequence[Permission]] = ()
    prefixes: ClassVar[tuple[str, ...]] = ()
    """Prefixes of permissions, settings, jobs and tables that this plugin owns beside its name; built-in ones only."""
    protected: ClassVar[Protection] = False
    """True: cannot be disabled or quarantined. `"essential"`: moreover, the process does not serve without it.

    Only plugins of Corral's own distribution may be protected. Write a literal: it is read from the source of a plugin
    that cannot be imported.
    """
    starts_first: ClassVar[bool] = False
    """Start before plugins that it does not require: what it does must precede their writes and reads of settings."""
    kernel_api: ClassVar[int] = KERNEL_API

    def __init__(self, settings: Any = None) -> None:
        self.section = settings
        """The validated `[plugins.<name>]`, an instance of `config`."""

    async def start(self, runtime: Runtime) -> None:
        """Called after boot, before the first request; raise to be `failed`."""

    async def stop(self) -> None:
        """Called at shutdown, after the last request."""

    @classmethod
    def title(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or cls.name).partition("\n")[0]

    @classmethod
    def description(cls) -> str:
        """The docstring after its first line."""
        return (inspect.getdoc(cls) or "").partition("\n")[2].strip()


class Runtime(Protocol):
    """What a plugin may do while it runs."""

    @property
    def address(self) -> str | None:
        """`http://127.0.0.1:8000` once the server listens; None in commands and tests without a server."""
        ...

    def service(self, kind: type[T]) -> T:
        """A service of this plugin or of one that it requires."""
        ...

    def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a background task until shutdown; when it ends or raises it is restarted with backoff (1 s to 60 s)."""
        ...

    def when_serving(self, run: Callable[[str], Awaitable[None]]) -> None:
        """Call `run(address)` once the server accepts connections; never called where nothing is served."""
        ...

    def when_draining(self, run: Callable[[], Awaitable[None]]) -> None:
        """Call `run` at shutdown while the server still answers; at most some seconds are given to it."""
        ...


class Installation(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the operator's configuration that plugins may read; a service of the kernel.

    `secrets`: the values of `CORRAL_SECRET_<NAME>`, by name. `processes`: the number of server processes. `is_public`:
    the server listens on more than the loopback interface. `bootstrap_admin`: an email address and a password.
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

    def __repr__(self) -> str:  # it holds secrets, and a repr ends up in logs
        return f"<Installation {self.data_dir}>"

    @classmethod
    def of(cls, config: Config) -> Self:
        """The part of the configuration."""
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
    def here(cls, config_path: Path | None = None) -> Self:
        """For commands, which have no kernel: as `corral serve` would read it. Raises `Refused`."""
        from corral.config.reader import load

        return cls.of(load(path=config_path))


class CommandSession(Protocol):
    """A kernel for one command on the machine itself; see `OpenSession`."""

    caller: Principal

    def service(self, kind: type[T]) -> T:
        """A service by type."""
        ...

    def run(self, fn: Callable[[], T], *, read: bool = False) -> T:
        """Run `fn` as one unit, whose actor is the operating-system user, and wait for its COMMIT."""
        ...


OpenSession = Callable[[Path | None, str], AbstractContextManager[CommandSession]]
"""The object of the click context of every command (`@click.pass_obj`): `with open(config_path, label) as session`.

A kernel on the installation's own database, beside a running server. Raises `Refused`, which the caller lets through.
"""


class Provide(msgspec.Struct, frozen=True):
    """`Provide(Tasks, TasksService)`: who asks for the type gets the one instance.

    Constructor parameters of `factory` are services of the kernel, of this plugin and of its `requires`. Attributes of
    the class annotated `X | None` are filled once all are made, with services of its `wants` (None: not active).
    """

    kind: type[Any]
    factory: Callable[..., Any]


class Settings(Protocol):
    """Reads settings as they are now: environment and file before what is stored, that before defaults."""

    def get(self, setting: Setting[T]) -> T: ...


class Setting(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A declared run-time value `category.key`. `kind` is the Python type; `null` is allowed where the default is None.

    Bounds are of a number, or of the length of a text or list. `check(value, all values)` judges what no type says,
    also beside other settings: what is wrong, as the rest of a sentence `category.key …`, or None.
    """

    name: str
    kind: Any
    default: T
    title: str
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None  # of the whole text, or of each text of a list
    check: Callable[[Any, Settings], str | None] | None = None
    env: str = ""  # the variable `CORRAL_…` that pins it
    restart_required: bool = False
    secret: bool = False


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the audit log, written in the transaction of the change. Who acts comes from the unit's entry.

    `action`: `<area>.<noun>.<verb>`. `changes`: field to `(from, to)`; a secret field is named with `SECRET_CHANGE`.
    `details`: what else an auditor must know; bodies never. Both pass the redactor. `code`: why not `success`.
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


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The `changes` of an audit entry: the fields of `after` that `before` does not have with the same value."""
    return {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}


class Audit(Protocol):
    """Records privileged changes; provided by the plugin `audit`."""

    @property
    def verbose(self) -> bool:
        """Whether reads and ordinary writes are to be recorded as well."""
        ...

    def record(self, entry: AuditEntry) -> None:
        """Add a row to the current unit; raises `Unavailable(audit_unavailable)` when it cannot be written."""
        ...


class Contributions(Protocol):
    """What active plugins contribute to the hooks of a plugin; ask when it is needed, not while services are made."""

    def of(self, hook: str) -> list[tuple[str, Any]]:
        """`(plugin, item)` for everything contributed to a hook."""
        ...


class HealthCheck(msgspec.Struct, frozen=True):
    """A dependency at `/settings/health`. `check` runs in a thread for at most 2 s and returns `(status, sentence)`."""

    name: str
    check: Callable[[], tuple[str, str]]


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """A series read at scrape time, in a read unit: `collect(…services)` gives `{label values: number}`.

    `labels`: the values each may take; others count as `other`. Counters and histograms
    (`corral.metrics.histogram.Histogram`) are of this process and summed over those that serve the address; gauges
    are of the installation, or `of_process`.
    """

    name: SeriesName
    help: str
    kind: Literal["gauge", "counter", "histogram"] = "gauge"
    of_process: bool = False
    labels: Mapping[SeriesName, Sequence[str]] = {}
    collect: Callable[..., Mapping[tuple[str, ...], Any]]


@runtime_checkable
class Gate(Protocol):
    """A check of every request before its route is looked up; raises a `Problem` to refuse."""

    def check(self, client_ip: str, method: str, path: str) -> None:
        """Called on the event loop: no I/O. Sockets and streams are judged again every second while they last."""
        ...


class Quota(NamedTuple):
    """What is left of a limit after a request; of several the tightest is told in `RateLimit-*`."""

    limit: int
    remaining: int
    reset_seconds: int


@runtime_checkable
class Meter(Protocol):
    """Counts requests. Called on the event loop: no I/O. Raises `TooMany`."""

    def arrive(self, client_ip: str, route: Route | None, *, anonymous: bool) -> Quota | None:
        """`route` is None where nothing is served. Who is not `anonymous` comes here for a rate `per="client"` only."""
        ...

    def enter(self, caller: Principal, route: Route, client_ip: str) -> Quota | None:
        """The caller is known. Where this returns, `leave` follows when the answer is there."""
        ...

    def leave(self, caller: Principal) -> None:
        """The answer is there; of a stream, its beginning."""
        ...


class RateLimits(Protocol):
    """Limits whose key only a handler knows; provided by the plugin `security`."""

    def take(self, rate: Rate, key: str) -> None:
        """Count one; on the event loop, before the unit. Raises `TooMany` when the bucket is empty."""
        ...
