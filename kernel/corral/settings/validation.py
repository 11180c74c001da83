"""Validation of settings: conversion and checks of values, and checks of declarations."""

from __future__ import annotations

import math
import re
import typing
from typing import Annotated, Any

import msgspec

from corral.config.reader import VARIABLES
from corral.http.handler_signature import without_none
from corral.plugin import Setting

LONGEST_NAME = 80
RESERVED = frozenset({"bulk", "health", "schema", "history", "test-mail"})  # paths below /settings
_VARIABLE = re.compile("CORRAL_[A-Z0-9_]+")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}\.[a-z][a-z0-9_]{0,63}")
_CREDENTIAL = re.compile(r"(^|_)(password|passphrase|secret|token|credentials?|api_?key|private_key|key)$")


WebUrl = Annotated[str, msgspec.Meta(max_length=2048, extra_json_schema={"format": "uri"})]
"""The type of a setting whose value is a URL. The egress guard checks the value before it is stored."""


class SettingRefused(ValueError):
    """Raised when the value of a setting is invalid. `code` is the error code in `errors[]` of the problem document."""

    def __init__(self, detail: str, code: str) -> None:
        super().__init__(detail)
        self.code = code


def convert_value(setting: Setting[Any], value: Any, source: str = "") -> Any:
    """Return the value converted to the setting's type. Booleans and numbers may be given as text.

    Raise a `SettingRefused` that names the setting and its bounds but never the value, which may be a secret.
    """
    if value is None and setting.default is None:
        return None
    try:
        found = msgspec.convert(value, setting.kind, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        raise _refusal(setting, source, "wrong_type", error) from None
    if found is None:
        return None
    if isinstance(found, float) and not math.isfinite(found):
        raise _refusal(setting, source, "wrong_type")
    if setting.minimum is not None or setting.maximum is not None:
        is_number = isinstance(found, (int, float))
        size = found if is_number else len(found)
        if setting.minimum is not None and size < setting.minimum:
            raise _refusal(setting, source, "too_small" if is_number else "too_short")
        if setting.maximum is not None and size > setting.maximum:
            raise _refusal(setting, source, "too_large" if is_number else "too_long")
    texts = found if isinstance(found, (list, tuple)) else (found,)
    if setting.choices and any(text not in setting.choices for text in texts):
        raise _refusal(setting, source, "not_in_enum")
    if setting.pattern is not None and not all(re.fullmatch(setting.pattern, str(text)) for text in texts):
        raise _refusal(setting, source, "bad_format")
    return found


def type_of_setting(setting: Setting[Any]) -> tuple[Any, bool]:
    """Return the setting's type without `Annotated` and `None`, and whether null is allowed."""
    kind, nullable = unwrap_type(setting.kind)
    return kind, nullable or setting.default is None


def unwrap_type(kind: Any) -> tuple[Any, bool]:
    """Return the type without `Annotated` and `None`, and whether the type allows null."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return without_none(kind)


def check_declaration(setting: Setting[Any]) -> None:
    """Raise `ValueError` if the declaration of a setting is invalid.

    A declaration is invalid if its name or environment variable is invalid, if it declares a credential without
    `secret=True`, or if it declares a secret that is not a string or has a default value.
    """
    category, _, key = setting.name.partition(".")
    if len(setting.name) > LONGEST_NAME:
        raise ValueError(f"setting {setting.name}: the name is longer than {LONGEST_NAME} characters")
    if not _NAME.fullmatch(setting.name) or category in RESERVED:
        raise ValueError(f"setting {setting.name}: the name must be category.key, in lower-case letters, digits and _")
    kind, _ = type_of_setting(setting)
    if kind is str and not setting.secret and not setting.choices and _CREDENTIAL.search(key):
        raise ValueError(f"setting {setting.name} looks like a credential: declare it with secret=True")
    if setting.secret and (kind is not str or setting.default is not None):
        raise ValueError(f"setting {setting.name}: a secret must be a string, and its default must be None")
    if setting.env in VARIABLES:
        raise ValueError(f"setting {setting.name}: the variable {setting.env} is already used for another purpose")
    if setting.env and not _VARIABLE.fullmatch(setting.env):
        raise ValueError(f"setting {setting.name}: the variable {setting.env} must match CORRAL_[A-Z0-9_]+")


def _refusal(setting: Setting[Any], source: str, code: str, error: Exception | None = None) -> SettingRefused:
    kind, nullable = type_of_setting(setting)
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
    expected += f" ({setting.accepts or setting.pattern})" if setting.pattern else ""
    expected += " or null" if nullable else ""
    return SettingRefused(f"{source + ': ' if source else ''}{setting.name} must be {expected}", code)
