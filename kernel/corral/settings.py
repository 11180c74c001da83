"""The registry of declared settings: what rules now, read without I/O.

Environment and file beat stored values, those beat defaults. Values are stored by the plugin `settings`, which applies
them here at start and after each change; without it default, file and environment rule.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from corral.config import PINNING, TABLE, Pinned
from corral.plugin import Setting

T = TypeVar("T")

LONGEST_NAME = 80
RESERVED = frozenset({"bulk", "health", "schema", "history", "test-mail"})  # paths below /settings
VARIABLES = {name: variable for variable, name in PINNING.items()} | {
    entry.key.pins: entry.key.variable for entry in TABLE.values() if entry.key.pins
}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\.[a-z][a-z0-9_]{0,63}")
_CREDENTIAL = re.compile(r"(^|_)(password|passphrase|secret|token|credentials?|api_?key|private_key|key)$")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?")


class SettingRefused(ValueError):
    """A value that a setting does not take. `code` is one of `errors[]` in problem documents."""

    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail)
        self.code = code


class StoredSetting(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of one setting. `is_set`: it was not reset. `problem`: why the value cannot be read."""

    value: Any
    version: int
    updated_at: str
    updated_by: str | None
    is_set: bool = True
    problem: str | None = None


class EffectiveSetting(msgspec.Struct, frozen=True, kw_only=True):
    """A setting with its value and where it is from. `pinned_by`: the variable or file that fixes it.

    `problem`: why the stored value is ignored. `pending`: this process goes on with the value it started with.
    """

    setting: Setting[Any]
    plugin: str
    value: Any
    source: Literal["default", "database", "environment"] = "default"
    pinned_by: str | None = None
    stored: StoredSetting | None = None
    problem: str | None = None
    pending: bool = False


class SettingsRegistry:
    """Implements `corral.plugin.Settings`. `is_shown`: whether the plugin that declares a setting is in service."""

    def __init__(self, pinned: Mapping[str, Pinned], is_shown: Callable[[str], bool] = lambda plugin: True) -> None:
        self._pinned, self._is_shown = pinned, is_shown
        self._effective: dict[str, EffectiveSetting] = {}
        self._values: dict[str, Any] = {}
        self._stored: Mapping[str, StoredSetting] = {}
        self._watchers: list[tuple[frozenset[str], Callable[[], None]]] = []
        self.version = -1
        """The version of the stored values that rule here; -1 until they were read."""

    def declare(self, settings: Iterable[Setting[Any]], plugin: str = "") -> None:
        """Add settings, all or none; `ValueError` for a bad or second name, and for a pinned value out of bounds."""
        added: dict[str, EffectiveSetting] = {}
        for setting in settings:
            _check_declaration(setting)
            if setting.name in self._effective or setting.name in added:
                raise ValueError(f"setting {setting.name} is declared twice")
            added[setting.name] = self._judge(setting, plugin, self._stored.get(setting.name))
        self._effective |= added
        self._values |= {name: item.value for name, item in added.items()}

    def get(self, setting: Setting[T]) -> T:
        """The effective value; settings read before they are declared have their default."""
        value: T = self._values.get(setting.name, setting.default)
        return value

    def all(self) -> list[EffectiveSetting]:
        """Every declared setting, by name."""
        return [self._effective[name] for name in sorted(self._effective)]

    def shown(self) -> list[EffectiveSetting]:
        """Those of plugins in service, by name."""
        return [item for item in self.all() if self._is_shown(item.plugin)]

    def find(self, name: str) -> EffectiveSetting | None:
        """One of `shown`."""
        found = self._effective.get(name)
        return found if found is not None and self._is_shown(found.plugin) else None

    def apply(self, version: int, stored: Mapping[str, StoredSetting]) -> None:
        """From now on these rows rule here. An older version than the one that rules changes nothing."""
        if version <= self.version:
            return
        started, self.version, self._stored = self.version >= 0, version, stored
        changed = set()
        for name, item in list(self._effective.items()):
            found = self._judge(item.setting, item.plugin, stored.get(name))
            if item.setting.restart_required and started:
                found = msgspec.structs.replace(found, pending=found.value != self._values[name])
            elif found.value != self._values[name]:
                self._values[name] = found.value
                changed.add(name)
            self._effective[name] = found
        for names, tell in self._watchers:
            if names & changed:
                tell()

    def watch(self, settings: Iterable[Setting[Any]], tell: Callable[[], None]) -> None:
        """Call `tell` now and, on the loop, whenever one of these has another value; it may neither fail nor block."""
        self._watchers.append((frozenset(setting.name for setting in settings), tell))
        tell()

    def judged(self, name: str, stored: Mapping[str, StoredSetting]) -> EffectiveSetting:
        """A declared setting as it would be with these rows stored."""
        item = self._effective[name]
        found = self._judge(item.setting, item.plugin, stored.get(name))
        return msgspec.structs.replace(
            found, pending=item.setting.restart_required and found.value != self._values[name]
        )

    def beside(self, stored: Mapping[str, StoredSetting]) -> Values:
        """The values as they would be with these rows stored."""
        judged = {
            name: self._judge(item.setting, item.plugin, stored.get(name)) for name, item in self._effective.items()
        }
        return Values({name: item.value for name, item in judged.items()})

    def broken(self, values: Values) -> dict[str, str]:
        """What `check` of settings finds wrong with these values, by name."""
        checks = [(item.setting.name, item.setting.check) for item in self.shown()]
        told = {name: check(values.of(name), values) for name, check in checks if check is not None}
        return {name: f"{name} {sentence}" for name, sentence in told.items() if sentence is not None}

    def unknown(self) -> list[str]:
        """Warnings for pinned names that nobody declared, with the nearest known name."""
        found = []
        for name, pinned in self._pinned.items():
            if name not in self._effective:
                near = difflib.get_close_matches(name, list(self._effective), 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                found.append(f"{pinned.source}: no active plugin has a setting {name}{hint}")
        return found

    def _judge(self, setting: Setting[Any], plugin: str, stored: StoredSetting | None) -> EffectiveSetting:
        """The setting as it is beside what is stored; a value that is refused is ignored, but a pinned one."""
        found = EffectiveSetting(setting=setting, plugin=plugin, value=setting.default, stored=stored)
        pinned = self._pinned.get(setting.name)
        if pinned is not None:
            value, by = accept(setting, pinned.value, pinned.source), Path(pinned.source).name
            return msgspec.structs.replace(found, value=value, source="environment", pinned_by=by)
        if stored is None or not stored.is_set:
            return found
        if stored.problem is not None:
            return msgspec.structs.replace(found, problem=stored.problem)
        try:
            return msgspec.structs.replace(found, value=accept(setting, stored.value), source="database")
        except SettingRefused as refusal:
            return msgspec.structs.replace(found, problem=f"The stored value is ignored: {refusal}.")


class Values:
    """Settings with values of a moment; implements `corral.plugin.Settings`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, setting: Setting[T]) -> T:
        """The value then."""
        value: T = self._values.get(setting.name, setting.default)
        return value

    def of(self, name: str) -> Any:
        """The value of a declared setting, by name."""
        return self._values[name]


def accept(setting: Setting[Any], value: Any, source: str = "") -> Any:
    """The value in the setting's type; a string that is exactly the text of the type is taken as that value.

    Raises `SettingRefused` that names the setting and its bounds; never the value, which may be a secret.
    """
    if value is None and setting.default is None:
        return None
    try:
        converted = msgspec.convert(_from_text(setting.kind, value), setting.kind)
    except msgspec.ValidationError as error:
        raise _refusal(setting, source, "wrong_type", error) from None
    if isinstance(converted, (int, float)) and not isinstance(converted, bool):
        size, below, above = converted, "too_small", "too_large"
    elif isinstance(converted, (str, list, tuple)):
        size, below, above = len(converted), "too_short", "too_long"
    else:
        size, below, above = 0, "", ""
    if below and setting.minimum is not None and size < setting.minimum:
        raise _refusal(setting, source, below)
    if above and setting.maximum is not None and size > setting.maximum:
        raise _refusal(setting, source, above)
    texts = converted if isinstance(converted, (list, tuple)) else (converted,)
    if setting.choices and any(text not in setting.choices for text in texts):
        raise _refusal(setting, source, "not_in_enum")
    if setting.pattern is not None and not all(re.fullmatch(setting.pattern, str(text)) for text in texts):
        raise _refusal(setting, source, "bad_format")
    return converted


def core_kind(setting: Setting[Any]) -> tuple[Any, bool]:
    """The type without `Annotated` and `None`, and whether `null` is allowed."""
    kind, nullable = core_type(setting.kind)
    return kind, nullable or setting.default is None


def core_type(kind: Any) -> tuple[Any, bool]:
    """The same of any type, such as that of a list's items."""
    nullable = False
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if type(None) in typing.get_args(kind) and len(members) == 1:
        kind, nullable = members[0], True
    return kind, nullable


def _from_text(kind: Any, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    options = {kind, *typing.get_args(kind)}
    if bool in options and value in ("true", "false"):
        return value == "true"
    if options & {int, float} and _NUMBER.fullmatch(value):
        return msgspec.json.decode(value)
    return value


def _check_declaration(setting: Setting[Any]) -> None:
    category, _, key = setting.name.partition(".")
    if len(setting.name) > LONGEST_NAME:
        raise ValueError(f"setting {setting.name}: the name is longer than {LONGEST_NAME} characters")
    if not _NAME.fullmatch(setting.name) or category in RESERVED:
        raise ValueError(f"setting {setting.name}: the name must be category.key, of lower-case letters, digits and _")
    kind, _ = core_kind(setting)
    if kind is str and not setting.secret and not setting.choices and _CREDENTIAL.search(key):
        raise ValueError(f"setting {setting.name} looks like a credential: declare it with secret=True")
    if setting.secret and (kind is not str or setting.default is not None):
        raise ValueError(f"setting {setting.name}: a secret is a text, and unset by default")
    if setting.env and VARIABLES.get(setting.name) != setting.env:
        raise ValueError(f"setting {setting.name}: {setting.env} pins nothing; corral.config.PINNING says what does")


def _refusal(setting: Setting[Any], source: str, code: str, error: Exception | None = None) -> SettingRefused:
    kind, nullable = core_kind(setting)
    least, most = setting.minimum, setting.maximum
    if setting.choices:
        expected = ("" if kind is str else "of ") + "one of " + ", ".join(setting.choices)
    elif kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        expected += f" from {least:g} to {most:g}" if least is not None and most is not None else ""
    elif kind in (bool, str):
        expected = "true or false" if kind is bool else "text"
        expected += f" of {least or 0:g} to {most:g} characters" if kind is str and most is not None else ""
    else:
        expected = "a list" if typing.get_origin(kind) in (list, tuple) else "valid"
        expected += f" of {least or 0:g} to {most:g} items" if most is not None else ""
        expected += f" ({error})" if error is not None else ""
    expected += f" that matches {setting.pattern}" if setting.pattern is not None else ""
    expected += " or null" if nullable else ""
    return SettingRefused(f"{source + ': ' if source else ''}{setting.name} must be {expected}", code)
