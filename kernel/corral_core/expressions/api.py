"""The public interface of the `expressions` plugin: the `Expressions` service and the error that it raises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from corral.errors import FieldError, Problem, declare_codes

declare_codes(
    {
        "template_error": (
            422,
            "An expression could not be evaluated",
            "The detail names the expression and the position of the fault. Use has(x.y) ? x.y : z or get(x, 'y', z) "
            "for data that may be absent.",
        )
    }
)


class TemplateError(Problem):
    """422: an expression is invalid, or its evaluation failed.

    Evaluating the expression again with the same data fails again. `position` is the 1-based character position of the
    error in `expression`.
    """

    default = "template_error"

    def __init__(self, expression: str, position: int, message: str) -> None:
        self.expression, self.position, self.message = expression, position, message
        shown = expression if len(expression) <= 200 else expression[:200] + "…"
        super().__init__(
            f"{message} (character {position} of the expression: {shown})", expression=shown, position=position
        )


class Expressions(Protocol):
    """Checks and evaluates CEL expressions, and templates with `{{ expression }}` in their strings.

    Do not call any method inside a unit of work, because evaluation takes time. The argument `roots` contains the names
    with which a reference may begin, such as `input` and `steps`. The argument `pointer` is the JSON pointer of the
    checked value.

    A secret is written `{{ secrets.NAME }}`, with nothing else in the braces. It is allowed only in templates whose
    `roots` contain `secrets`.
    """

    def check_expression(self, text: str, *, roots: Collection[str], pointer: str) -> list[FieldError]:
        """Return the errors in the syntax, roots, functions and size of a bare expression.

        The list is empty if the expression is valid.
        """
        ...

    def check_template(self, value: Any, *, roots: Collection[str], pointer: str) -> list[FieldError]:
        """Return the errors in all expressions in the strings of a JSON value."""
        ...

    def references(self, value: Any) -> set[str]:
        """Return the names of the steps that the templates in a JSON value reference as `steps.NAME`."""
        ...

    def expression_references(self, text: str) -> set[str]:
        """Return the names of the steps that a bare expression references as `steps.NAME`."""
        ...

    def secret_names(self, value: Any) -> set[str]:
        """Return the names of the secrets that the templates in a JSON value reference as `secrets.NAME`."""
        ...

    async def evaluate(self, text: str, data: Mapping[str, Any], *, boolean: bool = False) -> Any:
        """Return the value of a bare expression as JSON. `data` maps roots to their values.

        Raise `TemplateError` if the evaluation fails or, when `boolean` is set, if the value is not a boolean.
        """
        ...

    async def render(self, value: Any, data: Mapping[str, Any], *, secrets: Mapping[str, str] | None = None) -> Any:
        """Return a JSON value with the expressions in its strings replaced by their values.

        A string that consists of exactly one `{{ expression }}` becomes the expression's value and keeps its type. In
        all other strings, values are inserted as text. The result is never parsed again. References to secrets are
        replaced by the values in `secrets`. Without `secrets`, they remain unchanged, so that the result can be stored
        and shown. Never render such a result again, because the inserted data may contain expressions.

        Raise `TemplateError` if an expression is invalid or cannot be evaluated.
        """
        ...
