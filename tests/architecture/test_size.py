"""The mechanism of the kernel can be read in one sitting: its size is counted in lines of code and only goes down."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

KERNEL = Path(__file__).parents[2] / "kernel" / "corral"
BESIDE_THE_MECHANISM = frozenset({"cli", "testing", "scaffold"})
LEAVES = (
    "errors.py",
    "ids.py",
    "clock.py",
    "config",
    "schema",
    "crypto.py",
    "egress",
    "redact",
    "storage",
    "background_tasks.py",
)
LEAF_LINES = 1_808  # the modules that know no plugin
MECHANISM_LINES = 6_992  # only ever lowered (docs/adr/0002-size-of-the-kernel.md)
NO_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


def lines_of_code(source: str) -> int:
    """The lines that are neither blank nor part of a comment, a docstring or an import."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)  # a docstring
        ):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - left_out)


def test_the_mechanism_of_the_kernel_is_small() -> None:
    files = [
        path
        for path in KERNEL.rglob("*.py")
        if path.relative_to(KERNEL).parts[0] not in BESIDE_THE_MECHANISM
        and path.parent.name != "migrations"  # frozen copies of the models
    ]
    assert sum(lines_of_code(path.read_text(encoding="utf-8")) for path in files) <= MECHANISM_LINES


def test_the_leaves_of_the_kernel_are_small() -> None:
    files = [path for path in KERNEL.rglob("*.py") if path.relative_to(KERNEL).parts[0] in LEAVES]
    assert sum(lines_of_code(path.read_text(encoding="utf-8")) for path in files) <= LEAF_LINES
