"""The `Expressions` service, which decides in which process an expression is evaluated, and renders templates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import msgspec

from corral import clock
from corral.errors import FieldError
from corral_core.expressions.api import Expressions, TemplateError
from corral_core.expressions.service.cel import (
    MAX_RESULT_BYTES,
    EvaluationError,
    compile_expression,
    evaluate,
)
from corral_core.expressions.service.functions import MAX_TEXT
from corral_core.expressions.service.helper_process_client import HelperProcess
from corral_core.expressions.service.templates import Part, split_template, walk_strings
from corral_core.expressions.service.tokens import Analysis

MAX_DATA_BYTES = 1024 * 1024
IN_PROCESS_BYTES = 32 * 1024  # the library takes 0.1 ms to convert 1 KiB of small objects
IN_PROCESS_ADDITIONS = 1024 * 1024  # bytes that chained additions may copy; each copies what the earlier ones made
ENLARGING = ("replace", "join", "split", "parse_json", "json", "string")  # may return more than they were given


class ExpressionsService(Expressions):
    """Evaluates simple expressions in the server process, and all others in a separate helper process."""

    def __init__(self, process: HelperProcess) -> None:
        self._process = process

    def check_expression(self, text: str, *, roots: Collection[str], pointer: str) -> list[FieldError]:
        found, _ = compile_expression(text)
        faults = [(fault.offset, fault.message) for fault in found.faults]
        if not faults:
            faults = [
                (offset, _unknown_root_message(name, roots))
                for name, offset in found.roots.items()
                if name not in roots
            ]
        if not faults and "secrets" in found.roots:
            faults = [(found.roots["secrets"], "A secret is allowed only as {{ secrets.NAME }}, alone in its braces.")]
        return [FieldError(pointer, "template_error", _with_position(message, offset)) for offset, message in faults]

    def check_template(self, value: Any, *, roots: Collection[str], pointer: str) -> list[FieldError]:
        faults = []
        for place, text in walk_strings(value, pointer):
            for part in split_template(text):
                if not part.is_closed:
                    faults.append(
                        FieldError(place, "template_error", f"{{The braces {{ are never closed: {part.source[:80]}")
                    )
                elif part.expression is not None and not ("secrets" in roots and _secret_name(part)):
                    faults += self.check_expression(part.expression, roots=roots, pointer=place)
        return faults

    def references(self, value: Any) -> set[str]:
        return {step for found in _analyses(value) for step in found.steps}

    def expression_references(self, text: str) -> set[str]:
        return set(compile_expression(text)[0].steps)

    def secret_names(self, value: Any) -> set[str]:
        return {found.secret for found in _analyses(value) if found.secret is not None}

    async def evaluate(self, text: str, data: Mapping[str, Any], *, boolean: bool = False) -> Any:
        value = await self._evaluate(text, data, clock.time_s())
        if boolean and not isinstance(value, bool):
            raise TemplateError(text, 1, "The expression must evaluate to true or false.")
        return value

    async def render(self, value: Any, data: Mapping[str, Any], *, secrets: Mapping[str, str] | None = None) -> Any:
        return await self._render(value, data, secrets, clock.time_s())

    async def _render(self, value: Any, data: Mapping[str, Any], secrets: Mapping[str, str] | None, now: float) -> Any:
        if isinstance(value, str):
            return await self._render_text(value, data, secrets, now) if "{{" in value else value
        if isinstance(value, dict):
            return {key: await self._render(item, data, secrets, now) for key, item in value.items()}
        if isinstance(value, list):
            return [await self._render(item, data, secrets, now) for item in value]
        return value

    async def _render_text(
        self, text: str, data: Mapping[str, Any], secrets: Mapping[str, str] | None, now: float
    ) -> Any:
        parts = split_template(text)
        if len(parts) == 1:
            return await self._render_part(parts[0], data, secrets, now)
        texts = [_as_text(await self._render_part(part, data, secrets, now)) for part in parts]
        if sum(map(len, texts)) > MAX_RESULT_BYTES:
            raise TemplateError(text, 1, f"The text is longer than {MAX_RESULT_BYTES // 1024} KiB.")
        return "".join(texts)

    async def _render_part(
        self, part: Part, data: Mapping[str, Any], secrets: Mapping[str, str] | None, now: float
    ) -> Any:
        if part.expression is None:
            return part.source
        if not part.is_closed:
            raise TemplateError(part.expression, 1, "The braces {{ are never closed.")
        if (name := _secret_name(part)) is None:
            return await self._evaluate(part.expression, data, now)
        if secrets is None:
            return part.source
        if name not in secrets:
            raise TemplateError(part.expression, 1, f"The secret {name} is not available here.")
        return secrets[name]

    async def _evaluate(self, text: str, data: Mapping[str, Any], now: float) -> Any:
        found, _ = compile_expression(text)
        for name, offset in found.roots.items():
            if not found.faults and name not in data:
                raise TemplateError(text, offset + 1, _unknown_root_message(name, data.keys()))
        needed = _needed_data(found, data)
        encoded = msgspec.json.encode(needed)
        if len(encoded) > MAX_DATA_BYTES:
            raise TemplateError(text, 1, "The data that the expression uses is larger than 1 MiB.")
        try:
            if found.faults or _is_short_work(found, len(encoded)):
                return evaluate(text, needed, now)
            return await self._process.evaluate(text, encoded, now)
        except EvaluationError as error:
            raise TemplateError(text, error.offset + 1, error.message) from None


def _needed_data(found: Analysis, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the data that the expression needs."""
    needed = {name: data[name] for name in found.roots if name in data}
    if "steps" in needed and not found.uses_all_steps:
        needed["steps"] = {name: step for name, step in needed["steps"].items() if name in found.steps}
    return needed


def _is_short_work(found: Analysis, data_bytes: int) -> bool:
    """Return whether evaluating an expression with this data takes at most a few milliseconds.

    The time for a macro grows with the square of the list's length. The time for a regular expression grows with its
    length multiplied by the length of the text.
    """
    enlarging = sum(found.functions[name] for name in ENLARGING)
    if found.has_macros or "matches" in found.functions or data_bytes > IN_PROCESS_BYTES or enlarging > 1:
        return False
    largest = MAX_TEXT if enlarging else data_bytes
    return largest * (1 + found.additions) ** 2 <= IN_PROCESS_ADDITIONS


def _analyses(value: Any) -> Iterator[Analysis]:
    for _, text in walk_strings(value):
        for part in split_template(text):
            if part.expression is not None:
                yield compile_expression(part.expression)[0]


def _secret_name(part: Part) -> str | None:
    return compile_expression(part.expression)[0].secret if part.expression is not None else None


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def _unknown_root_message(name: str, roots: Collection[str]) -> str:
    return f"There is no name {name!r} here; the known names are: {', '.join(sorted(roots)) or 'none'}."


def _with_position(message: str, offset: int) -> str:
    return f"{message} (at character {offset + 1})"
