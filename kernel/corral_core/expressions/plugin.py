"""The manifest and the hook implementations of the `expressions` plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from corral.plugin import Plugin, Provide, hookimpl
from corral_core.expressions.api import Expressions
from corral_core.expressions.service.expressions import ExpressionsService
from corral_core.expressions.service.helper_process_client import HelperProcess


class ExpressionsPlugin(Plugin):
    """Expressions: evaluates the CEL expressions and templates in workflows, triggers and other configurations."""

    name = "expressions"
    protected = True

    def __init__(self, section: Any = None) -> None:
        super().__init__(section)
        self._process = HelperProcess()

    async def stop(self) -> None:
        await self._process.stop()

    @hookimpl
    def corral_services(self) -> Iterable[Provide]:
        return [
            Provide(HelperProcess, lambda: self._process),
            Provide(ExpressionsService, ExpressionsService),
            Provide(Expressions, _provide_expressions),
        ]


def _provide_expressions(service: ExpressionsService) -> Expressions:
    return service
