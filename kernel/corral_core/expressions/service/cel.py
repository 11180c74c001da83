"""Evaluates CEL expressions in the current process, with the library `common-expression-language`.

The helper process, which runs slow evaluations, also imports this module. It must therefore import neither the kernel
nor the plugin's API.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import logging
import math
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from corral_core.expressions.service.functions import cel_functions, duration_text, timestamp_text
from corral_core.expressions.service.tokens import Analysis, Fault, Token, analyse, string_content

MAX_RESULT_BYTES = 256 * 1024
MAX_RESULT_DEPTH = 64
_PARSE_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (?:Syntax error: )?([^\n]+)")
_SYNTAX_ERRORS = (  # the words of the parser, and ours
    (re.compile(r"missing '([^']+)' at .*"), "{} is missing"),
    (re.compile(r".*'<EOF>'.*|Incomplete .*"), "the expression is not complete"),
    (
        re.compile(r"(?:mismatched|extraneous) input '(.+)'|no viable alternative at input '(.+)'"),
        "{} is not expected here",
    ),
    (re.compile(r"reserved identifier: (\w+).*"), "the word {} is reserved and cannot be a name"),
)
_OPERATORS = {"and": "&&", "or": "||", "not": "!"}  # of languages that people confuse with CEL
_CONVERTED = {
    "int": "a whole number, such as 42",
    "double": "a number, such as 1.5",
    "timestamp": "a time with a zone, such as 2026-01-31T12:00:00Z",
    "duration": "a duration, such as 90s or 1h30m",
}
_UNDEFINED = re.compile(r"Undefined variable or function: '([^']*)'")
_FUNCTION_ERROR = re.compile(
    r"Function '([^']*)' error: (?:Python function call failed: \w+: )?(.*?)\. Check function arg", re.DOTALL
)


class EvaluationError(Exception):
    """Raised when an expression is invalid or its evaluation fails. Contains the offset of the error."""

    def __init__(self, offset: int, message: str) -> None:
        self.offset, self.message = offset, message
        super().__init__(message)


@functools.cache
def _cel_module() -> Any:
    """Return the extension module of the CEL library.

    The extension is loaded by its path, because its package also imports a terminal interface, which takes 0.3 s and
    is not needed here.
    """
    package = importlib.util.find_spec("cel")
    folders = package.submodule_search_locations if package is not None else None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if folders and (path := Path(folders[0]) / f"cel{suffix}").exists():
            spec = importlib.util.spec_from_file_location("cel.cel", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            log = logging.getLogger("cel")  # the library logs the errors of functions, with data from expressions
            log.propagate = False
            log.addHandler(logging.NullHandler())
            return module
    raise ImportError("the package common-expression-language is not installed; install it with pip")


@functools.lru_cache(maxsize=1024)
def compile_expression(text: str) -> tuple[Analysis, Any]:
    """Return the analysis of an expression and its compiled program.

    The program is None if the analysis found errors.
    """
    found = analyse(text)
    if not found.faults:
        try:
            return found, _cel_module().compile(found.program)
        except ValueError as error:
            found.faults.append(_syntax_fault(found, str(error)))
    return found, None


def evaluate(text: str, data: Mapping[str, Any], now: float) -> Any:
    """Return the value of an expression as JSON. Raise `EvaluationError` if the evaluation fails."""
    found, program = compile_expression(text)
    if found.faults:
        raise EvaluationError(found.faults[0].offset, found.faults[0].message)
    try:
        result = program.execute(_cel_module().Context(dict(data), cel_functions(now)))
    except MemoryError:
        raise EvaluationError(0, "The evaluation needs more memory than allowed.") from None
    except Exception as error:
        raise _evaluation_error(found, error) from None
    try:
        result = _json_value(result)
    except OverflowError:
        raise EvaluationError(0, "The result contains a time outside of the years 1 to 9999 in UTC.") from None
    if len(msgspec.json.encode(result)) > MAX_RESULT_BYTES:
        raise EvaluationError(0, f"The result is larger than {MAX_RESULT_BYTES // 1024} KiB.")
    return result


def _json_value(value: Any, depth: int = 0) -> Any:
    """Convert a value to JSON. Timestamps and durations become strings."""
    if depth > MAX_RESULT_DEPTH:
        raise EvaluationError(0, f"The result has more than {MAX_RESULT_DEPTH} levels.")
    match value:
        case None | bool():
            return value
        case int() if -(2**63) <= value < 2**63:
            return value
        case float() if math.isfinite(value):
            return value
        case str() if "\0" not in value:
            return value
        case list():
            return [_json_value(item, depth + 1) for item in value]
        case dict() if all(isinstance(key, str) and "\0" not in key for key in value):
            return {key: _json_value(item, depth + 1) for key, item in value.items()}
        case datetime():
            return timestamp_text(value)
        case timedelta():
            return duration_text(value)
    raise EvaluationError(0, f"The result contains {_describe_non_json(value)}, which JSON cannot represent.")


def _describe_non_json(value: Any) -> str:
    match value:
        case int() | float():
            return "a number that is infinite or too large, for example the result of a division by zero"
        case str():
            return "the character U+0000"
        case dict():
            return "an object whose keys are not strings"
        case _:
            return "a value of a type such as bytes"


def _syntax_fault(found: Analysis, message: str) -> Fault:
    match = _PARSE_ERROR.search(message)
    if match is None:
        return Fault(0, "The expression cannot be parsed.")
    lines = found.text.split("\n")
    line, column = int(match[1]), int(match[2])
    offset = min(sum(len(each) + 1 for each in lines[: line - 1]) + column - 1, len(found.text))
    reason = match[3].partition(" expecting ")[0]
    for pattern, words in _SYNTAX_ERRORS:
        if error := pattern.fullmatch(reason):
            reason = words.format(*filter(None, error.groups()))
            break
    near = [token.text for token in found.tokens if token.start <= offset][-2:]
    hint = next((f"; write {_OPERATORS[text]} instead of {text}" for text in near[::-1] if text in _OPERATORS), "")
    return Fault(offset, f"Syntax error: {reason}{hint}.")


def _evaluation_error(found: Analysis, error: Exception) -> EvaluationError:
    """Convert an error from the CEL library, which does not report where in the expression the error occurred.

    The offset is that of the first token that can be the cause, or the beginning of the expression.
    """
    text = str(error)
    if isinstance(error, KeyError):
        key = text.strip("'\"")
        return EvaluationError(_offset_of_key(found, key), f"There is no key {key!r}.")
    if isinstance(error, IndexError):
        return EvaluationError(_offset(found, "["), f"The index is not in the list: {text.rpartition(' ')[2]}.")
    if isinstance(error, ZeroDivisionError):
        return EvaluationError(_offset(found, "/", "%"), "Division by zero.")
    if isinstance(error, OverflowError):
        return EvaluationError(_offset(found, "+", "-", "*"), "The result is outside the range of a 64-bit integer.")
    if match := _UNDEFINED.search(text):
        function = {value: key for key, value in {"size": "Size", "string": "String"}.items()}.get(match[1], match[1])
        if function in found.functions:
            return EvaluationError(
                _offset(found, function), f"{function}() cannot be called in this way, or with a value of this type."
            )
        return EvaluationError(_offset(found, function), f"There is no name {function!r}.")
    if match := _FUNCTION_ERROR.search(text):
        function = match[1].lower() if match[1] in ("Size", "String") else match[1]
        return EvaluationError(_offset(found, function), _function_error(function, match[2]))
    detail = f"The types of the values do not fit the operation. {text.partition('. ')[2]}"
    return EvaluationError(0, detail.rstrip())


def _function_error(function: str, message: str) -> str:
    """Return the error of a function that refused a value. `message` is that of the library, or of our functions."""
    if message.startswith(f"{function}() "):
        return f"{message}."
    if function == "matches":
        return f"The regular expression of matches() is not valid: {message.rpartition('error: ')[2]}."
    if function in _CONVERTED:
        return f"{function}() needs {_CONVERTED[function]}."
    return f"{function}() failed: {message}."


def _offset(found: Analysis, *texts: str) -> int:
    return next((token.start for token in found.tokens if token.text in texts), 0)


def _offset_of_key(found: Analysis, key: str) -> int:
    previous = Token("", "", 0)
    for token in found.tokens:
        if (previous.text == "." and token.text == key) or (previous.text == "[" and string_content(token) == key):
            return token.start
        previous = token
    return 0
