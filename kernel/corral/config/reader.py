"""Reads `corral.toml` and the environment into a `Config`, and reports all errors together."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec

from corral.config.model import SECTIONS, TABLE, Config, ConfigField, Network, PinnedSetting
from corral.errors import StartupError

_BY_VARIABLE = {entry.key.variable: name for name, entry in TABLE.items() if entry.key.variable}
_WITH_FILE = ("MASTER_KEY", "JWT_SECRET", "DATABASE_URL", "BOOTSTRAP_ADMIN_PASSWORD", "METRICS_TOKEN")
_FROM_FILE = {f"CORRAL_{name}_FILE": f"CORRAL_{name}" for name in _WITH_FILE}
# These are used by commands only, and not configurable in the file.
_OF_COMMANDS = ("CORRAL_CONFIG", "CORRAL_TOKEN", "CORRAL_URL", "CORRAL_WORKER_TOKEN")
VARIABLES = frozenset({*_OF_COMMANDS, *_BY_VARIABLE, *_FROM_FILE})
COMMAND_LINE = "command line"
_WORDS = {"on": True, "yes": True, "off": False, "no": False}
_STOCK = re.compile(
    r"change|it|me|this|please|default|secret|password|admin|jwt|your|key|corral|super|very|insecure|example|here|test"
    r"|dev|replace|with|random|string|01234567890*|1234567890?|abcdef|(.)\1\1+"
)


def load(
    environ: Mapping[str, str] | None = None, *, path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Load the configuration. The command line overrides the environment, and the environment overrides the file.

    Keys that are not configured keep their default values. `overrides` contains the values from the command line, keyed
    by "section.key", "plugins.<name>" (a table) or "settings.<category>.<key>". Overrides with the value None are
    ignored, and so are empty environment variables.

    The configuration file is `path`. If `path` is None, the variable `CORRAL_CONFIG` names the file. If the variable is
    not set, `./corral.toml` is read or, if it does not exist, `/etc/corral/corral.toml`. With `path=Path(os.devnull)`,
    no file is read. Raises a `StartupError` that lists all errors.
    """
    reader = _Reader(os.environ if environ is None else environ)
    reader.read_file(path)
    reader.read_environment()
    for name, value in (overrides or {}).items():
        if value is not None:
            reader.set_value(name, value, COMMAND_LINE)
    return reader.result()


class _Reader:
    """Collects raw values in ascending order of precedence, then validates the effective values."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = {name: value for name, value in environ.items() if value}
        self.faults: list[str] = []
        self.warnings: list[str] = []
        self.raw: dict[str, tuple[Any, str]] = {}  # the value, and its source including the line in the file
        self.sources: dict[str, str] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.pinned: dict[str, PinnedSetting] = {}
        self.variables: dict[str, str] = {}
        self.secrets: dict[str, str] = {}
        self.path: Path | None = None

    def set_value(self, name: str, value: Any, source: str, place: str = "") -> None:
        section, _, rest = name.partition(".")
        self.sources[name] = source
        if name in TABLE:
            self.raw[name] = (value, place or source)
        elif section == "settings" and re.fullmatch(r"[a-z]\w*\.[a-z]\w*", rest):
            self.pinned[rest] = PinnedSetting(value, source)
        elif section == "plugins" and rest and isinstance(value, Mapping):
            self.tables[rest] = dict(value)
        elif name in {*SECTIONS, "settings"}:
            self.faults.append(f"{place or source}: {name} must be a table")
        else:
            self.faults.append(f"{place or source}: unknown key {name}{spelling_hint(name, [*TABLE, *SECTIONS])}")

    def read_file(self, path: Path | None) -> None:
        named = path or (Path(self.environ["CORRAL_CONFIG"]) if "CORRAL_CONFIG" in self.environ else None)
        candidates = [named] if named else [Path("corral.toml"), Path("/etc/corral/corral.toml")]
        try:
            found = next((candidate.absolute() for candidate in candidates if candidate.exists()), None)
            text = "" if found is None else found.read_text("utf-8")
            document = tomllib.loads(text)
        except (OSError, ValueError) as error:  # including invalid UTF-8 and TOML
            fault = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{found}: {error}"
            self.faults.append(fault)
            return
        if found is None:
            if path is not None:
                self.faults.append(f"{path}: the configuration file does not exist")
            elif named:
                self.warnings.append(f"CORRAL_CONFIG: {named} does not exist, so no configuration file is read")
            return
        self.path = found
        for name, value in _leaves(document):
            place = f"{found}:{_line_of(text, name)}"
            try:
                self.set_value(name, self.expand(value, name), str(found), place)
            except (OSError, ValueError) as error:
                self.faults.append(f"{place}: {name}: {error}")

    def expand(self, value: Any, name: str) -> Any:
        """Replace `${NAME}` with the value of the variable and `file:/path` with the content of the file, at any depth.

        `$${` stands for a literal `${`, and `file:///…` remains a URL.
        """
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
            raise ValueError(f"the environment variable {match[1]} is not set")
        return self.environ[match[1]]

    def read_environment(self) -> None:
        for variable in sorted(name for name in self.environ if name.startswith("CORRAL_")):
            value, target = self.environ[variable], _FROM_FILE.get(variable, variable)
            if secret := re.fullmatch(r"CORRAL_SECRET_([A-Za-z]\w{0,127})", variable, re.ASCII):
                self.secrets[secret[1]] = value
            elif target not in _BY_VARIABLE:
                if target not in _OF_COMMANDS:
                    self.variables[variable] = value
            elif target != variable and target in self.environ:
                self.faults.append(f"{variable}: {target} is also set; unset one of them")
            else:
                name = _BY_VARIABLE[target]
                try:
                    self.set_value(name, value if target == variable else _secret_file(Path(value), name), variable)
                except (OSError, ValueError) as error:
                    self.faults.append(f"{variable}: {error}")

    def parse(self, name: str, entry: ConfigField) -> Any:
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
            raise StartupError(*self.faults)
        values["database.url"] = values["database.url"] or f"sqlite:///{values['data_dir']}/corral.db"
        parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
        for name, value in values.items():
            section, _, field = name.rpartition(".")
            parts[section][field] = value
        parts["plugins"]["tables"] = self.tables
        sections: dict[str, Any] = {section: kind(**parts[section]) for section, kind in SECTIONS.items()}
        further: dict[str, Any] = {"pinned": self.pinned, "sources": self.sources, "path": self.path}
        further |= {"secrets": self.secrets, "variables": self.variables}
        return Config(**parts[""], **sections, **further, warnings=tuple(self.warnings))

    def check_together(self, values: Mapping[str, Any]) -> None:
        """Check the constraints that involve more than one key."""
        for name in ("keys.jwt_secret", "metrics_token"):
            if values[name] and len(_STOCK.sub("", re.sub(r"[\W_]", "", values[name].lower()))) < 6:
                self.faults.append(f"{self.raw[name][1]}: {name} is easy to guess; use a random value")
        if values["keys.jwt_secret"] and len(values["keys.jwt_secret"].encode()) < 32:
            self.faults.append(f"{self.raw['keys.jwt_secret'][1]}: keys.jwt_secret must have at least 32 bytes")
        if bool(values["server.certfile"]) != bool(values["server.keyfile"]):
            self.faults.append("server.certfile and server.keyfile must be set together")
        for name in sorted({*values["plugins.enabled"]} & {*values["plugins.disabled"]}):
            self.faults.append(f"plugins.enabled and plugins.disabled both list {name}; remove it from one of them")
        if bool(values["bootstrap_admin_email"]) != bool(values["bootstrap_admin_password"]):
            self.warnings.append("bootstrap_admin_email and bootstrap_admin_password must be set together")
        if not values["rate_limits"]:
            self.warnings.append("rate_limits is off, which is only suitable for tests")
        if values["database.synchronous"] == "normal":
            self.warnings.append("database.synchronous is normal, so a power loss may lose committed changes")


def _checked(value: Any, entry: ConfigField) -> Any:
    """Return the value converted to the type of its key. Errors never contain the value, which may be a secret."""
    words = [word for word in get_args(entry.type) if isinstance(word, str)]  # the values of a Literal
    if isinstance(value, str):
        value = value.strip()
        if isinstance(entry.default, tuple):
            value = [part.strip() for part in value.split(",") if part.strip()]
        elif bool in (entry.type, *get_args(entry.type)):
            value = _WORDS.get(value.lower(), value)
        elif words:
            value = value.lower()
    try:
        value = msgspec.convert(value, entry.type, strict=not isinstance(value, str), dec_hook=lambda _, raw: Path(raw))
        if Network in get_args(entry.type):
            value = tuple(str(ipaddress.ip_network(network, strict=False)) for network in value)
    except (ValueError, TypeError) as error:
        hint = " or ".join(words) or next(_descriptions(entry.type), "") or str(error).replace("Expected ", "")
        raise ValueError(f"must be {hint}") from None
    return value


def _descriptions(kind: Any) -> Iterator[str]:
    """Yield the descriptions in the annotations of a type, for error messages."""
    yield from (note.description for note in getattr(kind, "__metadata__", ()) if getattr(note, "description", None))
    for inner in get_args(kind):
        yield from _descriptions(inner)


def _leaves(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each value of the document with its full name.

    The table of a plugin and a table that is the value of a run-time setting are yielded as single values.
    """
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
    """Return the number of the line that sets `name`, or of the line that begins its closest enclosing table.

    The text is searched, because tomllib does not report line numbers.
    """
    here, line_found, longest = "", 1, 0
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*(\[*)([\w\s.\"'-]+)[]=]", line):
            full = ("" if match[1] else here) + re.sub(r"[\s\"']", "", match[2])
            here = f"{full}." if match[1] else here
            if f"{name}.".startswith(f"{full}.") and len(full) > longest:
                line_found, longest = number, len(full)
    return line_found


def spelling_hint(name: str, known: Iterable[str]) -> str:
    """Return a hint that suggests the known name most similar to `name`, or "" if no known name is similar."""
    return "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(name, list(known), 1))


def readable_by_others(path: Path) -> bool:
    """Return whether users other than the file's owner and group may read, change or execute the file."""
    return os.name == "posix" and bool(path.stat().st_mode & stat.S_IRWXO)


def _secret_file(path: Path, name: str) -> str:
    if name.startswith("keys.") and readable_by_others(path):
        raise ValueError(f"{path}: other users can read this key; run chmod 600 {path}")
    if not (text := path.read_text("utf-8").strip()):
        raise ValueError(f"{path} is empty; write the value of {name} to it")
    return text
