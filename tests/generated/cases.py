"""The cases that hypothesis makes of an operation. Making one costs more than asking it: what comes out the same each
time is made once for both engines.
"""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

_made: dict[tuple[str, str, GenerationMode, int], list[Case[Any]]] = {}


class Cases:
    """Of the operations of one document."""

    def __init__(self, document: dict[str, Any], *, derandomize: bool) -> None:
        self._key, self._derandomize = json.dumps(document, sort_keys=True), derandomize

    def of(self, described: Any, mode: GenerationMode, count: int) -> list[Case[Any]]:
        """So many cases; none of an operation that takes nothing which could be wrong. They may be changed."""
        if not self._derandomize:
            return _make(described, mode, count, derandomize=False)
        key = (self._key, described.label, mode, count)
        if key not in _made:
            _made[key] = _make(described, mode, count, derandomize=True)
        return [_copy(case) for case in _made[key]]


def _make(described: Any, mode: GenerationMode, count: int, *, derandomize: bool) -> list[Case[Any]]:
    made: list[Case[Any]] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=described.as_strategy(generation_mode=mode))
    def each(case: Case[Any]) -> None:
        made.append(case)

    with contextlib.suppress(Unsatisfiable):
        each()
    return made


def _copy(case: Case[Any]) -> Case[Any]:
    made: Case[Any] = case.derive()
    object.__setattr__(made, "_meta", copy.deepcopy(case.meta))  # it notes what was changed since
    return made
