"""The kernel names no feature: neither a permission, setting, job, path nor error code that belongs to a plugin."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "kernel" / "corral"
BESIDE_THE_KERNEL = frozenset({"testing", "scaffold"})  # they speak of plugins by profession
# `settings` is also a section of corral.toml, which the kernel reads.
FEATURES = sorted(
    {path.parent.name for path in (ROOT / "plugins" / "corral_plugins").glob("*/plugin.py")} - {"settings"}
)

# `tasks.read`, `/tasks`, `/api/v1/tasks`
NAMED = re.compile(rf"\b(?:{'|'.join(FEATURES)})\.[a-z_]+\b|/(?:{'|'.join(FEATURES)})\b")
# `/run/secrets/` is where container engines mount files.
MOUNTED = "file:/run/secrets/"


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a module without its docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node.lineno, node.value


def _modules() -> Iterator[Path]:
    for path in sorted(KERNEL.rglob("*.py")):
        if path.relative_to(KERNEL).parts[0] not in BESIDE_THE_KERNEL:
            yield path


def _codes_of_plugins() -> set[str]:
    """The error codes that plugins declare with `declare_codes({...})`."""
    found: set[str] = set()
    for root in ("plugins/corral_plugins", "kernel/corral_core"):
        for path in (ROOT / root).rglob("*.py"):
            text = path.read_text("utf-8")
            if "declare_codes" not in text:
                continue  # parsing every module takes seconds
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "declare_codes":
                    for argument in node.args:
                        assert isinstance(argument, ast.Dict), f"{path}: declare the codes as a literal"
                        found |= {str(key.value) for key in argument.keys if isinstance(key, ast.Constant)}
    return found


def test_the_kernel_names_no_permission_setting_job_or_path_of_a_feature() -> None:
    assert len(FEATURES) > 10
    assert [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in _modules()
        for line, text in _texts(path)
        if NAMED.search(text.replace(MOUNTED, ""))
    ] == []


def test_the_kernel_names_no_error_code_of_a_feature() -> None:
    codes = _codes_of_plugins()
    assert len(codes) > 10
    assert [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in _modules()
        for line, text in _texts(path)
        if text in codes
    ] == []
