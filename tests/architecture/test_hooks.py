"""Every hook is documented, with its signature and an example, and tested by its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "hooks.md"


class Hook(NamedTuple):
    name: str
    signature: str
    owner: str


def _hooks(path: Path) -> list[Hook]:
    """The functions marked with `@hookspec`, without importing anything."""
    found = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any("hookspec" in ast.unparse(mark) for mark in node.decorator_list):
            assert node.returns is not None, f"{path}: {node.name} says not what it returns"
            signature = f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
            found.append(Hook(node.name, signature, path.parent.name))
    return found


KERNEL = _hooks(ROOT / "kernel" / "corral" / "hookspecs.py")
OFFERED = [
    hook
    for root in ("kernel/corral_core", "plugins", "contrib")
    for path in (ROOT / root).rglob("hookspecs.py")
    for hook in _hooks(path)
]
HOOKS = [*KERNEL, *OFFERED]
TESTED = {
    name
    for folder in (ROOT / "tests", *(ROOT / "contrib").glob("*/tests"))
    for path in folder.rglob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text("utf-8"), re.MULTILINE)
}
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))

each = pytest.mark.parametrize("hook", HOOKS, ids=[hook.name for hook in HOOKS])


@each
def test_a_hook_is_documented_with_its_signature(hook: Hook) -> None:
    assert hook.name in SECTIONS, f"{PAGE.relative_to(ROOT)} has no section {hook.name}"
    assert f"\n{hook.signature}\n" in SECTIONS[hook.name]
    if hook in OFFERED:
        assert f"Of `{hook.owner}`:" in SECTIONS[hook.name]


@each
def test_a_hook_has_an_example_that_implements_it(hook: Hook) -> None:
    signature, *examples = re.findall(r"```python\n(.*?)```", SECTIONS[hook.name], re.DOTALL)
    assert signature == hook.signature + "\n"
    (implementation,) = ast.parse(examples[-1]).body
    assert isinstance(implementation, ast.FunctionDef)
    assert implementation.name == hook.name
    taken = [argument.arg for argument in implementation.args.args]
    assert taken == ["self", *re.findall(r"(\w+):", hook.signature.partition("->")[0])]
    marks = [ast.unparse(mark) for mark in implementation.decorator_list]
    assert marks == ["hookimpl" if hook in KERNEL else "hookimpl(optionalhook=True)"]


@each
def test_a_hook_is_tested_by_its_name(hook: Hook) -> None:
    assert f"test_{hook.name}" in TESTED


def test_the_page_documents_nothing_else() -> None:
    assert list(SECTIONS) == [hook.name for hook in KERNEL] + sorted(hook.name for hook in OFFERED)
