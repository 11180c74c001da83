"""What the operator decides before the start: `corral.toml` and `CORRAL_*`, read once into one frozen `Config`.

The annotated fields of `Config` and its sections, with `PINNING`, are the one table of what can be configured: loading,
checks, `describe()` and `sample()` are made from them. Values of run-time settings that the file or the environment
fixes are handed on unchecked in `Config.pinned`; the settings registry judges them.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta

from corral.errors import Refused

MASK = "********"

Text = Annotated[str, Meta(pattern=r"\S", description="text")]
_PORT = r"(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
Bind = Annotated[str, Meta(pattern=rf"^(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+):{_PORT}$", description="host:port")]
Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="a list of plugin names")]
Host = Annotated[str, Meta(pattern=r"^[\w*\[][\w.:\]-]*$", description="a list of host names")]
Network = Annotated[str, Meta(description="a list of addresses and networks")]
Exempt = Annotated[
    str, Meta(pattern=r"^[\w.:\[\]*-]+(/\d+(:\d+)?)?$", description="a list of host[:port], cidr[:port]")
]
WebUrl = Annotated[str, Meta(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", description="http(s)://host[:port][/path]")]
ProxyUrl = Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+/?$", description="http(s)://[user:password@]host:port")]
SqlUrl = Annotated[str, Meta(pattern=r"^(sqlite:///|postgresql://)\S", description="sqlite:///… or postgresql://…")]
RedisUrl = Annotated[str, Meta(pattern=r"^(rediss?|unix)://\S", description="redis://…, rediss://… or unix://…")]
StoreUrl = Annotated[str, Meta(pattern=r"^(s3://|file:///)\S", description="s3://bucket?endpoint=… or file:///…")]


class Key(NamedTuple):
    """What the table says of a field beside type and default; `pins`: the run-time setting that a given value fixes."""

    doc: str
    variable: str = ""
    secret: bool = False
    example: Any = None
    pins: str = ""


class Pinned(NamedTuple):
    """A run-time setting fixed from outside: the unchecked value, and the variable or file that fixes it."""

    value: Any
    source: str


class Row(NamedTuple):
    """One line of `config show`; `value` is JSON-able and masked."""

    key: str
    value: Any
    source: str
    doc: str
    secret: bool


class _Part(msgspec.Struct, frozen=True):
    def __repr__(self) -> str:  # several fields are secrets, and a repr ends up in logs
        return f"<{type(self).__name__}>"


class Server(_Part, frozen=True):
    """`[server]`: where and how requests are taken."""

    bind: Annotated[Bind, Key("Where to listen", "CORRAL_BIND")] = "127.0.0.1:8000"
    public_url: Annotated[
        WebUrl | None, Key("What links are built from", "CORRAL_PUBLIC_URL", example="https://corral.example.org")
    ] = None
    allowed_hosts: Annotated[tuple[Host, ...], Key("Further names for the Host header", "CORRAL_ALLOWED_HOSTS")] = ()
    trusted_proxies: Annotated[tuple[Network, ...], Key("Whose X-Forwarded-For counts", "CORRAL_TRUSTED_PROXIES")] = ()
    processes: Annotated[int, Meta(ge=1, le=256), Key("Server processes on this machine")] = 1
    server: Annotated[Literal["hypercorn", "uvicorn", "granian"], Key("The ASGI server")] = "hypercorn"
    fast_dispatch: Annotated[bool, Key("Serve routes from the kernel's own table")] = True
    body_timeout_seconds: Annotated[
        int, Meta(ge=1, le=3600), Key("A body without progress is refused after", "CORRAL_BODY_TIMEOUT")
    ] = 30
    certfile: Annotated[Path | None, Key("TLS certificate chain", example="/etc/corral/tls.crt")] = None
    keyfile: Annotated[Path | None, Key("TLS private key", example="/etc/corral/tls.key")] = None


class Database(_Part, frozen=True):
    """`[database]`; `migrate_on_start` None means on for SQLite and off for PostgreSQL."""

    url: Annotated[
        SqlUrl,
        Key("Unset: corral.db in the data folder", "CORRAL_DATABASE_URL", example="postgresql://localhost/corral"),
    ] = ""
    migrate_on_start: Annotated[bool | None, Key("Unset: on SQLite only", example=True)] = None
    pool_size: Annotated[int, Meta(ge=1, le=512), Key("PostgreSQL connections of a process")] = 16
    synchronous: Annotated[
        Literal["full", "normal"], Key("SQLite; normal may lose commits at power loss", "CORRAL_SQLITE_SYNCHRONOUS")
    ] = "full"


class Redis(_Part, frozen=True):
    """`[redis]`; without a URL there is none."""

    url: Annotated[
        RedisUrl | None, Key("Bus, counters, jobs", "CORRAL_REDIS_URL", example="redis://localhost:6379/0")
    ] = None


class Storage(_Part, frozen=True):
    """`[storage]`; without a URL `Config.files_dir` is used."""

    url: Annotated[
        StoreUrl | None, Key("Unset: a folder in the data folder", "CORRAL_STORAGE_URL", example="s3://bucket")
    ] = None
    max_upload_bytes: Annotated[
        int,
        Meta(ge=1024, le=10 * 2**30),
        Key("Largest upload", "CORRAL_MAX_UPLOAD_BYTES", pins="files.max_upload_bytes"),
    ] = 104_857_600


class Keys(_Part, frozen=True):
    """`[keys]` as configured; `corral.crypto.Keyring` parses `master_key`."""

    master_key: Annotated[
        Text | None, Key("v2:<base64>,v1:<base64>; the first is active", "CORRAL_MASTER_KEY", True)
    ] = None
    jwt_secret: Annotated[Text | None, Key("Replaces the stored keys; >= 32 bytes", "CORRAL_JWT_SECRET", True)] = None


class Egress(_Part, frozen=True):
    """`[egress]`: exceptions of the egress guard, as text, and its proxy."""

    allow: Annotated[tuple[Exempt, ...], Key("Exceptions of the egress guard", "CORRAL_EGRESS_ALLOW")] = ()
    proxy: Annotated[
        ProxyUrl | None, Key("Proxy of the guard", "CORRAL_EGRESS_PROXY", example="http://proxy.example.org:3128")
    ] = None


class Plugins(_Part, frozen=True):
    """`[plugins]`; `tables` holds each `[plugins.<name>]` raw, for the plugin's own schema to check."""

    enabled: Annotated[tuple[Name, ...], Key("Third-party plugins that load")] = ()
    disabled: Annotated[tuple[Name, ...], Key("Built-in plugins that do not load")] = ()
    strict: Annotated[bool, Key("The first plugin that fails stops the start")] = False
    dir: Annotated[
        Path | None, Key("Made by pip install --target", "CORRAL_PLUGIN_DIR", example="/srv/corral-plugins")
    ] = None
    tables: Mapping[str, dict[str, Any]] = msgspec.field(default_factory=dict)


class Config(_Part, frozen=True):
    """All of it, checked. `sources` tells where each given value came from; `path` is the file read, if any."""

    data_dir: Annotated[Path, Key("Database, files, keys; mode 0700", "CORRAL_DATA_DIR")] = Path("corral-data")
    safe_mode: Annotated[bool, Key("Load only protected plugins", "CORRAL_SAFE_MODE")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Key("Least level logged", "CORRAL_LOG_LEVEL")
    ] = "info"
    log_format: Annotated[Literal["json", "console"], Key("Form of log lines", "CORRAL_LOG_FORMAT")] = "json"
    rate_limits: Annotated[bool, Key("Off is for tests only", "CORRAL_RATE_LIMITS")] = True
    ip_rules_disabled: Annotated[bool, Key("Ignore the IP rules: a way back in", "CORRAL_IP_RULES_DISABLED")] = False
    metrics_token: Annotated[Text | None, Key("What /metrics asks for", "CORRAL_METRICS_TOKEN", True)] = None
    bootstrap_admin_email: Annotated[
        Text | None, Key("First admin, while there is none", "CORRAL_BOOTSTRAP_ADMIN_EMAIL", example="me@example.org")
    ] = None
    bootstrap_admin_password: Annotated[
        Text | None, Key("Of the first admin", "CORRAL_BOOTSTRAP_ADMIN_PASSWORD", True)
    ] = None
    local_model: Annotated[
        Path | None, Key("Model file for corral-llama", "CORRAL_LOCAL_MODEL", example="/srv/model.gguf")
    ] = None
    worker_token: Annotated[Text | None, Key("Registers `corral worker`", "CORRAL_WORKER_TOKEN", True)] = None
    server: Server = Server()
    database: Database = Database()
    redis: Redis = Redis()
    storage: Storage = Storage()
    keys: Keys = Keys()
    egress: Egress = Egress()
    plugins: Plugins = Plugins()
    pinned: Mapping[str, Pinned] = msgspec.field(default_factory=dict)
    sources: Mapping[str, str] = msgspec.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def files_dir(self) -> Path | None:
        """The folder of stored files; None when `[storage] url` names another kind of store."""
        if self.storage.url is None:
            return self.data_dir / "files"
        return Path(self.storage.url[7:]) if self.storage.url.startswith("file://") else None

    def describe(self) -> list[Row]:
        """Every key, pinned setting and plugin table with its value and source; secrets are masked."""
        rows = []
        for name, entry in TABLE.items():
            section, _, field = name.rpartition(".")
            value = _shown(getattr(getattr(self, section) if section else self, field), entry.key.secret)
            rows.append(Row(name, value, self.sources.get(name, "default"), entry.key.doc, entry.key.secret))
        loose = {f"settings.{name}": pin for name, pin in self.pinned.items()}
        for variable, name in PINNING.items():
            loose.setdefault(f"settings.{name}", Pinned(None, f"not pinned by {variable}"))
        for name, table in self.plugins.tables.items():
            loose[f"plugins.{name}"] = Pinned(table, self.sources.get(f"plugins.{name}", "default"))
        for name, pin in sorted(loose.items()):
            secret = bool(_SECRET_NAME.search(name.split(".", 1)[1]))
            rows.append(Row(name, _shown(pin.value, secret), pin.source, "", secret))
        return rows


class _Entry(NamedTuple):
    type: Any
    key: Key
    default: Any


def _table() -> dict[str, _Entry]:
    found = {}
    parts: dict[str, type[_Part]] = {"": Config, **SECTIONS}
    for section, part in parts.items():
        for field in msgspec.structs.fields(part):
            for key in (note for note in getattr(field.type, "__metadata__", ()) if isinstance(note, Key)):
                found[f"{section}.{field.name}".lstrip(".")] = _Entry(field.type, key, field.default)
    return found


SECTIONS: Mapping[str, type[_Part]] = {
    name: kind for name, kind in get_type_hints(Config).items() if isinstance(kind, type) and issubclass(kind, _Part)
}
TABLE: Mapping[str, _Entry] = _table()
PINNING: Mapping[str, str] = {
    "CORRAL_REGISTRATION": "security.registration",
    "CORRAL_ACCESS_TTL": "security.access_ttl_seconds",
    "CORRAL_REFRESH_TTL": "security.refresh_absolute_seconds",
    "CORRAL_REFRESH_GRACE": "security.refresh_grace_seconds",
    "CORRAL_LOCKOUT_THRESHOLD": "security.lockout_threshold",
    "CORRAL_LOCKOUT_WINDOW": "security.lockout_window_seconds",
    "CORRAL_LOCKOUT_SECONDS": "security.lockout_seconds",
    "CORRAL_WEBHOOK_RETRY_SCHEDULE": "webhooks.retry_schedule",
    "CORRAL_WEBHOOK_TIMEOUT": "webhooks.timeout_seconds",
    "CORRAL_WEBHOOK_DISABLE_AFTER": "webhooks.disable_after_seconds",
    "CORRAL_TASK_LEASE_SECONDS": "tasks.lease_seconds",
    "CORRAL_TASK_MAX_ATTEMPTS": "tasks.max_attempts",
}
_BY_VARIABLE = {entry.key.variable: name for name, entry in TABLE.items() if entry.key.variable}
_WITH_FILE = ("MASTER_KEY", "JWT_SECRET", "DATABASE_URL", "BOOTSTRAP_ADMIN_PASSWORD", "METRICS_TOKEN")
_FROM_FILE = {f"CORRAL_{name}_FILE": f"CORRAL_{name}" for name in _WITH_FILE}
_VARIABLES = ("CORRAL_CONFIG", *_BY_VARIABLE, *_FROM_FILE, *PINNING)
_WORDS = {"on": True, "yes": True, "off": False, "no": False}
_SECRET_NAME = re.compile(r"(password|secret|token|(^|[._]|api)key)$", re.IGNORECASE)
_STOCK = re.compile(
    r"change|it|me|this|please|default|secret|password|admin|jwt|your|key|corral|super|very|insecure|example|here|test"
    r"|dev|replace|with|random|string|01234567890*|1234567890?|abcdef|(.)\1\1+"
)


def _shown(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _shown(item, secret or bool(_SECRET_NAME.search(name))) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item, secret) for item in value]
    if secret and value is not None:
        return MASK
    if not isinstance(value, (str, Path)):
        return value if value is None or isinstance(value, (bool, int, float)) else str(value)
    text = re.sub(r"(://[^:@/]*):.*@", rf"\1:{MASK}@", str(value))
    return re.sub(r"([?&][^=&]*(?:key|secret|token|password)[^=&]*=)[^&]*", rf"\1{MASK}", text, flags=re.IGNORECASE)


def load(
    environ: Mapping[str, str] | None = None,
    *,
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Command line (`overrides`: "section.key") over environment over file over default; all faults in one `Refused`.

    None in the overrides and an empty variable count as not given. Overrides may also be "plugins.<name>" (a table) and
    "settings.<category>.<key>". The file is `path`, else `CORRAL_CONFIG`, else `./corral.toml`, else
    `/etc/corral/corral.toml`; `path=Path(os.devnull)` reads none.
    """
    reader = _Reader(os.environ if environ is None else environ)
    reader.read_file(path)
    reader.read_environment()
    for name, value in (overrides or {}).items():
        if value is not None:
            reader.take(name, value, "command line")
    return reader.result()


class _Reader:
    """Takes raw values from the weakest source to the strongest, then checks those that won."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = {name: value for name, value in environ.items() if value}
        self.faults: list[str] = []
        self.warnings: list[str] = []
        self.raw: dict[str, tuple[Any, str]] = {}  # value and place: like the source, with the line in the file
        self.sources: dict[str, str] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.pinned: dict[str, Pinned] = {}
        self.path: Path | None = None

    def take(self, name: str, value: Any, source: str, place: str = "") -> None:
        section, _, rest = name.partition(".")
        self.sources[name] = source
        if name in TABLE:
            self.raw[name] = (value, place or source)
            if TABLE[name].key.pins:
                self.pinned[TABLE[name].key.pins] = Pinned(value, source)
        elif section == "settings" and re.fullmatch(r"[a-z]\w*\.[a-z]\w*", rest):
            self.pinned[rest] = Pinned(value, source)
        elif section == "plugins" and rest and isinstance(value, Mapping):
            self.tables[rest] = dict(value)
        elif name in {*SECTIONS, "settings"}:
            self.faults.append(f"{place or source}: {name} must be a table")
        else:
            self.faults.append(f"{place or source}: unknown key {name}; {_nearest(name, TABLE)}")

    def read_file(self, path: Path | None) -> None:
        named = path or (Path(self.environ["CORRAL_CONFIG"]) if "CORRAL_CONFIG" in self.environ else None)
        candidates = [named] if named else [Path("corral.toml"), Path("/etc/corral/corral.toml")]
        found = next((candidate.absolute() for candidate in candidates if candidate.exists()), None)
        if found is None:
            if path is not None:
                self.faults.append(f"{path}: there is no such file")
            elif named:
                self.warnings.append(f"CORRAL_CONFIG: {named} does not exist; going on without a file")
            return
        try:
            text = found.read_text("utf-8")
            document = tomllib.loads(text)
        except (OSError, ValueError) as error:  # bad UTF-8 and bad TOML too; the message has the line
            self.faults.append(f"{found}: {error}")
            return
        self.path = found
        for name, value in _leaves(document):
            place = f"{found}:{_line_of(text, name)}"
            try:
                self.take(name, self.expand(value, name), str(found), place)
            except (OSError, ValueError) as error:
                self.faults.append(f"{place}: {name}: {error}")

    def expand(self, value: Any, name: str) -> Any:
        """Fill in `${NAME}` (`$${` is a literal one) and `file:/path` at any depth; `file:///…` stays a URL."""
        if isinstance(value, dict):
            return {field: self.expand(item, name) for field, item in value.items()}
        if isinstance(value, list):
            return [self.expand(item, name) for item in value]
        if not isinstance(value, str):
            return value
        if value.startswith("file:/") and not value.startswith("file://"):
            return _secret_file(Path(value[5:]), name)
        return re.sub(r"\$?\$\{(\w+)\}", self._variable, value)

    def _variable(self, match: re.Match[str]) -> str:
        if match[0].startswith("$$"):
            return match[0][1:]
        if match[1] not in self.environ:
            raise ValueError(f"the variable {match[1]} is not set")
        return self.environ[match[1]]

    def read_environment(self) -> None:
        for variable in sorted(name for name in self.environ if name.startswith("CORRAL_")):
            value, target = self.environ[variable], _FROM_FILE.get(variable, variable)
            if target in PINNING:
                parts = [int(part) if part.strip().isdecimal() else part.strip() for part in value.split(",")]
                self.pinned[PINNING[target]] = Pinned(parts if "," in value else value, variable)
            elif target not in _BY_VARIABLE:
                if target != "CORRAL_CONFIG" and not re.match("CORRAL_SECRET_.", target):
                    self.warnings.append(f"{variable}: unknown variable; {_nearest(variable, _VARIABLES)}")
            elif target != variable and target in self.environ:
                self.faults.append(f"{variable}: {target} is set too; keep one of them")
            else:
                name = _BY_VARIABLE[target]
                try:
                    self.take(name, value if target == variable else _secret_file(Path(value), name), variable)
                except (OSError, ValueError) as error:
                    self.faults.append(f"{variable}: {error}")

    def parse(self, name: str, entry: _Entry) -> Any:
        value, place = self.raw.get(name, (entry.default, "default"))
        if name in self.raw:
            try:
                value = _checked(value, entry)
            except (ValueError, TypeError) as error:
                self.faults.append(f"{place}: {name} {error}")
        return value.expanduser().absolute() if isinstance(value, Path) else value

    def result(self) -> Config:
        values = {name: self.parse(name, entry) for name, entry in TABLE.items()}
        if not self.faults:
            self.check_together(values)
        if self.faults:
            raise Refused(*self.faults)
        values["database.url"] = values["database.url"] or f"sqlite:///{values['data_dir']}/corral.db"
        parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
        for name, value in values.items():
            section, _, field = name.rpartition(".")
            parts[section][field] = value
        parts["plugins"]["tables"] = self.tables
        sections: dict[str, Any] = {section: kind(**parts[section]) for section, kind in SECTIONS.items()}
        told: dict[str, Any] = {"pinned": self.pinned, "sources": self.sources, "path": self.path}
        return Config(**parts[""], **sections, **told, warnings=tuple(self.warnings))

    def check_together(self, values: Mapping[str, Any]) -> None:
        """What no single type says."""
        for name in ("keys.jwt_secret", "metrics_token"):
            if values[name] and len(_STOCK.sub("", re.sub(r"[\W_]", "", values[name].lower()))) < 6:
                self.faults.append(f"{self.raw[name][1]}: {name} is a known default or too simple; make your own")
        if values["keys.jwt_secret"] and len(values["keys.jwt_secret"].encode()) < 32:
            self.faults.append(f"{self.raw['keys.jwt_secret'][1]}: keys.jwt_secret must have at least 32 bytes")
        if bool(values["server.certfile"]) != bool(values["server.keyfile"]):
            self.faults.append("server.certfile and server.keyfile belong together; one is missing")
        for name in sorted({*values["plugins.enabled"]} & {*values["plugins.disabled"]}):
            self.faults.append(f"plugins.enabled and plugins.disabled both name {name}")
        if bool(values["bootstrap_admin_email"]) != bool(values["bootstrap_admin_password"]):
            self.warnings.append("bootstrap_admin_email and bootstrap_admin_password belong together; one is missing")
        if not values["rate_limits"]:
            self.warnings.append("rate_limits is off: fit for tests only")
        if values["database.synchronous"] == "normal":
            self.warnings.append("database.synchronous is normal: a power loss may lose acknowledged commits")


def _checked(value: Any, entry: _Entry) -> Any:
    """The value in its type; the error says what it must be, and never holds the value: it may be a secret."""
    kind = get_args(entry.type)[0]
    words = [word for word in get_args(kind) if isinstance(word, str)]  # of a Literal
    if isinstance(value, str):
        value = value.strip()
        if isinstance(entry.default, tuple):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif bool in (kind, *get_args(kind)):
            value = _WORDS.get(value.lower(), value)
        elif words:
            value = value.lower()
    try:
        value = msgspec.convert(value, entry.type, strict=not isinstance(value, str), dec_hook=lambda _, raw: Path(raw))
        if Network in get_args(kind):
            value = tuple(str(ipaddress.ip_network(network, strict=False)) for network in value)
    except (ValueError, TypeError) as error:
        hint = " or ".join(words) or next(_descriptions(entry.type), "") or str(error).replace("Expected ", "")
        raise ValueError(f"must be {hint}") from None
    return value


def _descriptions(kind: Any) -> Iterator[str]:
    yield from (note.description for note in getattr(kind, "__metadata__", ()) if getattr(note, "description", None))
    for inner in get_args(kind):
        yield from _descriptions(inner)


def _leaves(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The document by full names; plugin tables and values of settings stay whole."""
    for section, table in document.items():
        if not isinstance(table, dict) or section not in {*SECTIONS, "settings"}:
            yield section, table
            continue
        for key, value in table.items():
            if section == "settings" and isinstance(value, dict) and "." not in key:  # tasks.lease_seconds, unquoted
                yield from ((f"settings.{key}.{name}", item) for name, item in value.items())
            else:
                yield f"{section}.{key}", value


def _line_of(text: str, name: str) -> int:
    """The line that gives `name`, else that of the nearest table around it: tomllib does not keep lines."""
    here, line_found, longest = "", 1, 0
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*(\[*)([\w\s.\"'-]+)[]=]", line):
            full = ("" if match[1] else here) + re.sub(r"[\s\"']", "", match[2])
            here = f"{full}." if match[1] else here
            if f"{name}.".startswith(f"{full}.") and len(full) > longest:
                line_found, longest = number, len(full)
    return line_found


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"the nearest is {difflib.get_close_matches(name, list(known), 1, 0.0)[0]}"


def readable_by_others(path: Path) -> bool:
    """Whether the mode lets every user of the machine at this file."""
    return os.name == "posix" and bool(path.stat().st_mode & stat.S_IRWXO)


def _secret_file(path: Path, name: str) -> str:
    if name.startswith("keys.") and readable_by_others(path):
        raise ValueError(f"{path}: others may read this key; chmod 600 {path}")
    if not (text := path.read_text("utf-8").strip()):
        raise ValueError(f"{path} is empty")
    return text


def ensure_data_dir(config: Config) -> None:
    """Make the data folder with mode 0700; refuse one that cannot be used or holds keys that others may read."""
    folder = config.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        exposed = [path for path in sorted(folder.glob("*.key")) if readable_by_others(path)]
    except OSError as error:
        raise Refused(f"{folder}: the data folder cannot be made: {error.strerror}") from None
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise Refused(f"{folder}: the data folder cannot be read and written")
    if exposed:
        raise Refused(*(f"{path}: others may read this key; chmod 600 {path}" for path in exposed))


def sample() -> str:
    """A `corral.toml` with every key explained and commented out."""
    lines = ["# The command line and the environment win over this file. Values may be ${VARIABLE} or file:/path."]
    here = ""
    for name, entry in TABLE.items():
        section, _, field = name.rpartition(".")
        if section != here:
            lines += ["", f"[{section}]"]
            here = section
        value = f"file:/run/secrets/{field}" if entry.key.secret else entry.key.example or entry.default
        variable = f" ({entry.key.variable})" if entry.key.variable else ""
        shown = json.dumps(value, default=str)
        lines += [f"# {entry.key.doc}{variable}", f"# {field} = {shown}"]
    return "\n".join([*lines, "", "[settings]", "# Fixes a run-time setting", '# "tasks.lease_seconds" = 60', ""])
