"""The configuration: `corral.toml` and `CORRAL_*` variables, read at startup into one frozen `Config`.

The annotated fields of `Config` and its sections define everything that can be configured. Loading, validation,
`rows()` and `corral config init` are derived from them. Run-time settings that the file or the command line pins
(`Config.pinned`) and the remaining `CORRAL_*` variables (`Config.variables`) are not validated here; the settings
registry validates both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints
from urllib.parse import unquote

import msgspec
from msgspec import Meta

MASK = "********"

Text = Annotated[str, Meta(pattern=r"\S", description="text")]
_PORT = r"(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
Bind = Annotated[str, Meta(pattern=rf"^(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+):{_PORT}$", description="host:port")]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="a list of plugin names")]
Host = Annotated[str, Meta(pattern=r"^\w[\w.-]*(:\d+)?$", description="a list of host names")]
Network = Annotated[str, Meta(description="a list of addresses and networks")]
Exemption = Annotated[
    str, Meta(pattern=r"^[\w.:\[\]*-]+(/\d+(:\d+)?)?$", description="a list of host[:port], cidr[:port]")
]
WebUrl = Annotated[str, Meta(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", description="http(s)://host[:port][/path]")]
ProxyUrl = Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+/?$", description="http(s)://[user:password@]host:port")]
_PG = r"postgresql://(?=\S)([^\s@/]*@)?[^\s@?]*(\?\S*)?$"
_SQL_HINT = "sqlite:///… or postgresql://… (in a password, @ is written %40, / %2F and % %25)"
SqlUrl = Annotated[str, Meta(pattern=rf"^(sqlite:///\S|{_PG})", description=_SQL_HINT)]
RedisUrl = Annotated[str, Meta(pattern=r"^(rediss?|unix)://\S", description="redis://…, rediss://… or unix://…")]
StoreUrl = Annotated[str, Meta(pattern=r"^(s3://|file:///)\S", description="s3://bucket?endpoint=… or file:///…")]


class Key(NamedTuple):
    """Describes one configuration key, as the annotation of its field.

    `doc` documents the field, and `variable` is the environment variable that sets it.
    """

    doc: str
    variable: str = ""
    secret: bool = False


class PinnedSetting(NamedTuple):
    """A run-time setting that is pinned by a variable or the file: the unvalidated value and its source."""

    value: Any
    source: str


class Row(NamedTuple):
    """A configured value. `secret` means that the whole value is a credential."""

    key: str
    value: Any
    source: str
    doc: str
    secret: bool


class _Part(msgspec.Struct, frozen=True):
    def __repr__(self) -> str:  # some fields are secrets, and a repr may be logged
        return f"<{type(self).__name__}>"


class Server(_Part, frozen=True):
    """Section `[server]`: how requests are served."""

    bind: Annotated[Bind, Key("Address and port to listen on", "CORRAL_BIND")] = "127.0.0.1:8000"
    public_url: Annotated[WebUrl | None, Key("Base URL of this installation, for links", "CORRAL_PUBLIC_URL")] = None
    allowed_hosts: Annotated[tuple[Host, ...], Key("Additional accepted host names", "CORRAL_ALLOWED_HOSTS")] = ()
    trusted_proxies: Annotated[
        tuple[Network, ...], Key("Proxies whose X-Forwarded-For is trusted", "CORRAL_TRUSTED_PROXIES")
    ] = ()
    processes: Annotated[int, Meta(ge=1, le=256), Key("Number of server processes on this machine")] = 1
    server: Annotated[
        Literal["auto", "hypercorn", "uvicorn"], Key("ASGI server; auto selects uvicorn if installed")
    ] = "auto"
    fast_dispatch: Annotated[bool, Key("Dispatch requests with the kernel's own route table")] = True
    body_timeout_seconds: Annotated[
        int, Meta(ge=1, le=3600), Key("Longest pause within a request body, in seconds", "CORRAL_BODY_TIMEOUT")
    ] = 30
    certfile: Annotated[Path | None, Key("TLS certificate chain")] = None
    keyfile: Annotated[Path | None, Key("TLS private key")] = None


class Database(_Part, frozen=True):
    """Section `[database]`. `migrate_on_start=None` means on for SQLite and off for PostgreSQL."""

    url: Annotated[SqlUrl, Key("Database; default: corral.db in data_dir", "CORRAL_DATABASE_URL")] = ""
    migrate_on_start: Annotated[bool | None, Key("Migrate at start; default: only on SQLite")] = None
    pool_size: Annotated[int, Meta(ge=1, le=512), Key("PostgreSQL connections per process")] = 16
    synchronous: Annotated[
        Literal["full", "normal"], Key("Durability of SQLite; normal may lose commits", "CORRAL_SQLITE_SYNCHRONOUS")
    ] = "full"

    @property
    def is_file(self) -> bool:
        """Whether the database is a file on this machine (SQLite)."""
        return not self.url or self.url.startswith("sqlite:")


class Redis(_Part, frozen=True):
    """Section `[redis]`. Without a URL, Redis is not used."""

    url: Annotated[RedisUrl | None, Key("Redis server for notifications, limits and jobs", "CORRAL_REDIS_URL")] = None


class Storage(_Part, frozen=True):
    """Section `[storage]`. Without a URL, files are stored in `Config.files_dir`."""

    url: Annotated[StoreUrl | None, Key("File store; default: a folder in data_dir", "CORRAL_STORAGE_URL")] = None


class Keys(_Part, frozen=True):
    """Section `[keys]`. `corral.crypto.Keyring` parses `master_key`."""

    master_key: Annotated[
        Text | None, Key("Master keys as v2:<base64>,v1:<base64>; the first is active", "CORRAL_MASTER_KEY", True)
    ] = None
    jwt_secret: Annotated[
        Text | None, Key("Signs access tokens instead of the stored keys; at least 32 bytes", "CORRAL_JWT_SECRET", True)
    ] = None


class Egress(_Part, frozen=True):
    """Section `[egress]`: exceptions to the egress guard, and the proxy for outgoing connections."""

    allow: Annotated[
        tuple[Exemption, ...], Key("Addresses that the egress guard also allows", "CORRAL_EGRESS_ALLOW")
    ] = ()
    proxy: Annotated[ProxyUrl | None, Key("Proxy for all outgoing connections", "CORRAL_EGRESS_PROXY")] = None


class Plugins(_Part, frozen=True):
    """Section `[plugins]`.

    `tables` contains each `[plugins.<name>]` table unchecked, because the plugin validates it.
    """

    enabled: Annotated[tuple[Name, ...], Key("Third-party plugins to load")] = ()
    disabled: Annotated[tuple[Name, ...], Key("Built-in plugins not to load")] = ()
    strict: Annotated[bool, Key("Refuse to start if a plugin fails")] = False
    dir: Annotated[Path | None, Key("Folder of plugins installed by pip install --target", "CORRAL_PLUGIN_DIR")] = None
    tables: Mapping[str, dict[str, Any]] = msgspec.field(default_factory=dict)


class Config(_Part, frozen=True):
    """The validated configuration.

    `sources` maps each configured key to its source. `path` is the configuration file, or None if none was read.
    """

    data_dir: Annotated[Path, Key("Folder of the database, files and keys; its mode is 0700", "CORRAL_DATA_DIR")] = (
        Path("corral-data")
    )
    safe_mode: Annotated[bool, Key("Load only protected plugins", "CORRAL_SAFE_MODE")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Key("Minimum level of log lines", "CORRAL_LOG_LEVEL")
    ] = "info"
    log_format: Annotated[Literal["auto", "json", "console"], Key("Format of log lines", "CORRAL_LOG_FORMAT")] = "auto"
    rate_limits: Annotated[bool, Key("Apply rate limits; off is for tests only", "CORRAL_RATE_LIMITS")] = True
    ip_rules_disabled: Annotated[bool, Key("Ignore the IP rules, to regain access", "CORRAL_IP_RULES_DISABLED")] = False
    metrics_token: Annotated[Text | None, Key("Bearer token required by /metrics", "CORRAL_METRICS_TOKEN", True)] = None
    bootstrap_admin_email: Annotated[
        Text | None, Key("Email address of the first admin", "CORRAL_BOOTSTRAP_ADMIN_EMAIL")
    ] = None
    bootstrap_admin_password: Annotated[
        Text | None, Key("Password of the first admin", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD", True)
    ] = None
    local_model: Annotated[Path | None, Key("Model file for corral-llama", "CORRAL_LOCAL_MODEL")] = None
    server: Server = Server()
    database: Database = Database()
    redis: Redis = Redis()
    storage: Storage = Storage()
    keys: Keys = Keys()
    egress: Egress = Egress()
    plugins: Plugins = Plugins()
    pinned: Mapping[str, PinnedSetting] = msgspec.field(default_factory=dict)
    variables: Mapping[str, str] = msgspec.field(default_factory=dict)
    """The remaining `CORRAL_*` variables. Each may pin the run-time setting that declares this variable."""
    secrets: Mapping[str, str] = msgspec.field(default_factory=dict)  # values of CORRAL_SECRET_<NAME>, by name
    sources: Mapping[str, str] = msgspec.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def files_dir(self) -> Path | None:
        """The folder of stored files, or None if `[storage] url` does not name a folder."""
        if self.storage.url is None:
            return self.data_dir / "files"
        return Path(self.storage.url[7:]) if self.storage.url.startswith("file://") else None

    def credentials(self) -> dict[str, str]:
        """Return every configured credential, passwords in URLs included, by the name of its key, for the redactor."""
        return {name: text for row in self.rows() for name, text in _secrets(row.key, row.value, row.secret)}

    def rows(self) -> Iterator[Row]:
        """Yield every key, pinned setting, variable and plugin table with its value and source."""
        for name, entry in TABLE.items():
            section, _, field = name.rpartition(".")
            value = getattr(getattr(self, section) if section else self, field)
            yield Row(name, value, self.sources.get(name, "default"), entry.key.doc, entry.key.secret)
        further = {f"settings.{name}": pin for name, pin in self.pinned.items()}
        further |= {f"variables.{name}": PinnedSetting(value, name) for name, value in self.variables.items()}
        for name, table in self.plugins.tables.items():
            further[f"plugins.{name}"] = PinnedSetting(table, self.sources.get(f"plugins.{name}", "default"))
        for name, pin in sorted(further.items()):
            yield Row(name, pin.value, pin.source, "", bool(SECRET_NAME.search(name.split(".", 1)[1])))


class ConfigField(NamedTuple):
    """A field of the configuration: its type, annotation and default."""

    type: Any
    key: Key
    default: Any


def _fields_by_name() -> dict[str, ConfigField]:
    found = {}
    parts: dict[str, type[_Part]] = {"": Config, **SECTIONS}
    for section, part in parts.items():
        for field in msgspec.structs.fields(part):
            for key in (note for note in getattr(field.type, "__metadata__", ()) if isinstance(note, Key)):
                found[f"{section}.{field.name}".lstrip(".")] = ConfigField(field.type, key, field.default)
    return found


SECTIONS: Mapping[str, type[_Part]] = {
    name: kind for name, kind in get_type_hints(Config).items() if isinstance(kind, type) and issubclass(kind, _Part)
}
TABLE: Mapping[str, ConfigField] = _fields_by_name()
CREDENTIAL_IN_URL = re.compile(
    r"://[^:@/\s]*:([^\s]*)@|[?&][^=&\s]*(?:key|secret|token|password)[^=&\s]*=([^&\s]+)", re.IGNORECASE
)
SECRET_NAME = re.compile(r"(password|secret|token|(^|[._]|api)key)$", re.IGNORECASE)


def _secrets(name: str, value: Any, secret: bool) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each credential that a configuration value contains."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(f"{name}.{key}", item, secret or bool(SECRET_NAME.search(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _secrets(f"{name}.{number}", item, secret)
    elif isinstance(value, str) and (secret or SECRET_NAME.search(name)):
        yield name, value
    elif isinstance(value, str):
        for number, match in enumerate(CREDENTIAL_IN_URL.finditer(value)):
            text = match[match.lastindex or 0]
            yield f"{name}.{number}", text
            if (plain := unquote(text)) != text:
                yield f"{name}.{number}.plain", plain
