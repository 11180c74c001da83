"""The configuration: `corral.toml` and `CORRAL_*` variables, read at startup into one frozen `Config`.

`config_keys.json` lists everything that can be configured, with descriptions and variables. The fields of `Config` and
its sections define the types and defaults. Loading, validation, `rows()` and `corral config init` use both. Run-time
settings that the file or the command line pins (`Config.pinned`) and the remaining `CORRAL_*` variables
(`Config.variables`) are not validated here; the settings registry validates them.
"""

from __future__ import annotations

import json
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
    str, Meta(pattern=r"^[\w.:\[\]*-]+(/\d+(:\d+)?)?$", description="a list of host[:port] or CIDR[:port] entries")
]
WebUrl = Annotated[str, Meta(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", description="http(s)://host[:port][/path]")]
ProxyUrl = Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+/?$", description="http(s)://[user:password@]host:port")]
_PG = r"postgresql://(?=\S)([^\s@/]*@)?[^\s@?]*(\?\S*)?$"
_SQL_HINT = "sqlite:///… or postgresql://… (in a password, @ is written %40, / %2F and % %25)"
SqlUrl = Annotated[str, Meta(pattern=rf"^(sqlite:///\S|{_PG})", description=_SQL_HINT)]
RedisUrl = Annotated[str, Meta(pattern=r"^(rediss?|unix)://\S", description="a redis://, rediss:// or unix:// URL")]
StoreUrl = Annotated[str, Meta(pattern=r"^(s3://|file:///)\S", description="an s3://bucket?endpoint=… or file:/// URL")]


class Key(NamedTuple):
    """Describes one configuration key. `variable` is the environment variable that sets it.

    `secret` means that the whole value is a credential.
    """

    doc: str
    variable: str = ""
    secret: bool = False


class PinnedSetting(NamedTuple):
    """The unvalidated value of a run-time setting that a variable or the file pins, and the source of the value."""

    value: Any
    source: str


class Row(NamedTuple):
    """A configured value for display. `secret` means that the whole value is a credential."""

    key: str
    value: Any
    source: str
    doc: str
    secret: bool


class _Masked(msgspec.Struct, frozen=True):
    def __repr__(self) -> str:  # some fields are secrets, and a repr may be logged
        return f"<{type(self).__name__}>"


class Server(_Masked, frozen=True):
    """Section `[server]`: how requests are served."""

    bind: Bind = "127.0.0.1:8000"
    public_url: WebUrl | None = None
    allowed_hosts: tuple[Host, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()
    processes: Annotated[int, Meta(ge=1, le=256)] = 1
    server: Literal["auto", "hypercorn", "uvicorn"] = "auto"
    fast_dispatch: bool = True
    body_timeout_seconds: Annotated[int, Meta(ge=1, le=3600)] = 30
    certfile: Path | None = None
    keyfile: Path | None = None


class Database(_Masked, frozen=True):
    """Section `[database]`. `migrate_on_start=None` means on for SQLite and off for PostgreSQL."""

    url: SqlUrl = ""
    migrate_on_start: bool | None = None
    pool_size: Annotated[int, Meta(ge=1, le=512)] = 16
    synchronous: Literal["full", "normal"] = "full"

    @property
    def is_file(self) -> bool:
        """Whether the database is a file on this machine (SQLite)."""
        return not self.url or self.url.startswith("sqlite:")


class Redis(_Masked, frozen=True):
    """Section `[redis]`. Without a URL, Redis is not used."""

    url: RedisUrl | None = None


class Storage(_Masked, frozen=True):
    """Section `[storage]`. Without a URL, files are stored in `Config.files_dir`."""

    url: StoreUrl | None = None


class Keys(_Masked, frozen=True):
    """Section `[keys]`. The value of `master_key` is parsed by `corral.crypto.Keyring`."""

    master_key: Text | None = None
    jwt_secret: Text | None = None


class Egress(_Masked, frozen=True):
    """Section `[egress]`: exemptions from the egress guard, and the proxy for outgoing connections."""

    allow: tuple[Exemption, ...] = ()
    proxy: ProxyUrl | None = None


class Plugins(_Masked, frozen=True):
    """Section `[plugins]`.

    `tables` contains each `[plugins.<name>]` table unchecked, because the plugin validates it.
    """

    enabled: tuple[Name, ...] = ()
    disabled: tuple[Name, ...] = ()
    strict: bool = False
    dir: Path | None = None
    tables: Mapping[str, dict[str, Any]] = msgspec.field(default_factory=dict)


class Config(_Masked, frozen=True):
    """The validated configuration.

    `sources` maps each configured key to its source. `path` is the configuration file, or None if none was read.
    """

    data_dir: Path = Path("corral-data")
    safe_mode: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    rate_limits: bool = True
    ip_rules_disabled: bool = False
    metrics_token: Text | None = None
    bootstrap_admin_email: Text | None = None
    bootstrap_admin_password: Text | None = None
    local_model: Path | None = None
    server: Server = Server()
    database: Database = Database()
    redis: Redis = Redis()
    storage: Storage = Storage()
    keys: Keys = Keys()
    egress: Egress = Egress()
    plugins: Plugins = Plugins()
    pinned: Mapping[str, PinnedSetting] = msgspec.field(default_factory=dict)
    variables: Mapping[str, str] = msgspec.field(default_factory=dict)
    """The remaining `CORRAL_*` variables. A variable pins the run-time setting that declares it, if any."""
    secrets: Mapping[str, str] = msgspec.field(default_factory=dict)  # values of CORRAL_SECRET_<NAME>, by name
    sources: Mapping[str, str] = msgspec.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def files_dir(self) -> Path | None:
        """The folder for stored files, or None if `[storage] url` does not name a folder."""
        if self.storage.url is None:
            return self.data_dir / "files"
        return Path(self.storage.url[7:]) if self.storage.url.startswith("file://") else None

    def credentials(self) -> dict[str, str]:
        """Return every configured credential for the redactor, keyed by configuration key.

        Passwords in URLs are included.
        """
        return {name: text for row in self.rows() for name, text in _secrets(row.key, row.value, row.secret)}

    def rows(self) -> Iterator[Row]:
        """Yield a row for each configuration key, pinned setting, environment variable and plugin table."""
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
    """A field of the configuration: its type, description and default."""

    type: Any
    key: Key
    default: Any


SECTIONS: Mapping[str, type[_Masked]] = {
    name: kind for name, kind in get_type_hints(Config).items() if isinstance(kind, type) and issubclass(kind, _Masked)
}
_PARTS: dict[str, type[_Masked]] = {"": Config, **SECTIONS}
_FIELDS = {
    f"{section}.{field.name}".lstrip("."): field
    for section, part in _PARTS.items()
    for field in msgspec.structs.fields(part)
}
TABLE: Mapping[str, ConfigField] = {
    name: ConfigField(_FIELDS[name].type, Key(**entry), _FIELDS[name].default)
    for name, entry in json.loads(Path(__file__).with_name("config_keys.json").read_bytes()).items()
}
"""All configuration keys. The descriptions are from `config_keys.json`, and the types and defaults from `Config`."""
CREDENTIAL_IN_URL = re.compile(
    r"://[^:@/\s]*:([^\s]*)@|[?&][^=&\s]*(?:key|secret|token|password)[^=&\s]*=([^&\s]+)", re.IGNORECASE
)
# Matches neither `max_tokens` nor the table of the plugin `secrets`.
SECRET_NAME = re.compile(r"(?i)(pass(word|phrase)s?|secret|token|(^|[._-]|api)key|^tokens|[_-]keys|authorization)$")


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
