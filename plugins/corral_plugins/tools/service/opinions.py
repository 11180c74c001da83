"""What a tool's own code and schema say of a call. Code of plugins: when it fails, the answer is the cautious one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from corral.errors import Fault, Invalid
from corral.schema.data import check_user_schema, json_schema_problems
from corral_plugins.tools.api import Target, Tool, ToolContext
from corral_plugins.tools.service.decision import Rule
from corral_plugins.tools.service.registry import Known

log = logging.getLogger("corral.tools")

NO_CONFIG: dict[str, Any] = {"type": "object", "additionalProperties": False}


class Opinion(msgspec.Struct, frozen=True, kw_only=True):
    """As in `Case`. What looks into the arguments is only asked about those that match the schema."""

    faults: tuple[Fault, ...] = ()
    sees: bool = True
    admitted: bool = True
    is_trusted: bool = False
    target_asks: bool = False


def opinion(known: Known, rule: Rule, arguments: Any, context: ToolContext) -> Opinion:
    """The tool's word on these arguments; joins the caller's unit."""
    tool = known.tool
    if faults := _faults(known, arguments):
        return Opinion(faults=tuple(faults))
    target = None if tool.target is None else _asked(tool, tool.target, arguments)
    return Opinion(
        sees=tool.sees is None or _asked(tool, tool.sees, context, arguments) is True,
        admitted=_is_admitted(known, rule, arguments),
        is_trusted=tool.trusts is not None and _asked(tool, tool.trusts, known.config, arguments) is True,
        target_asks=target is FAILED or (isinstance(target, Target) and target.ask),
    )


FAILED = object()


def _asked(tool: Tool, function: Callable[..., Any], *given: Any) -> Any:
    """What it says; `FAILED` when it raises."""
    try:
        return function(*given)
    except Exception:
        log.exception("a tool could not judge a call", extra={"tool": tool.name})
        return FAILED


def _faults(known: Known, arguments: Any) -> list[Fault]:
    """Where the arguments do not match the tool's schema."""
    if not isinstance(arguments, dict):
        return [Fault("/arguments", "wrong_type", "must be an object")]
    schema = known.tool.schema
    if known.source == "worker" and not _is_harmless(msgspec.json.encode(schema)):
        return []  # it is for the worker to check
    found = _asked(known.tool, lambda: json_schema_problems(schema, arguments, pointer_prefix="/arguments"))
    if found is FAILED:
        return [Fault("/arguments", "not_allowed", "the tool's own schema is not valid; its plugin must be mended")]
    faults: list[Fault] = found
    return faults


def _is_admitted(known: Known, rule: Rule, arguments: Any) -> bool:
    """Whether the tool's configuration and the agent's, which can only narrow it, both admit the arguments."""
    tool = known.tool
    if rule.config and json_schema_problems(tool.config_schema or NO_CONFIG, dict(rule.config)):
        return False  # what the tool does not understand it cannot keep to
    if tool.admits is None:
        return True
    configs = [known.config] if rule.config is None else [known.config, rule.config]
    return all(_asked(tool, tool.admits, config, arguments) is True for config in configs)


@functools.lru_cache(maxsize=512)
def _is_harmless(schema: bytes) -> bool:
    """Whether a worker's schema can be validated here: valid, small, and without regular expressions."""
    try:
        check_user_schema(msgspec.json.decode(schema))
    except Invalid:
        return False
    return True
