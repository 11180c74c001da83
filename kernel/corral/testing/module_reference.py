"""Renders the public names of modules as Markdown, with their documentation and their source code without bodies."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class ModuleSource:
    """The source code of a module, and its top-level statements, keyed by the name that they define."""

    def __init__(self, module: str) -> None:
        text = Path(str(importlib.import_module(module).__file__)).read_text("utf-8")
        self._lines = text.splitlines()
        self.tree = ast.parse(text)
        self.definitions: dict[str, list[Definition]] = {}
        self.constants: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, Definition):
                self.definitions.setdefault(node.name, []).append(node)
            else:
                self.constants |= dict.fromkeys(_assigned_names(node), node)

    def doc(self, name: str = "") -> str:
        """Return the docstring of a class or function, or of the module if `name` is empty.

        Return an empty string for a constant.
        """
        nodes: Sequence[Definition | ast.Module] = self.definitions.get(name, ()) if name else [self.tree]
        return (ast.get_docstring(nodes[-1]) or "") if nodes else ""

    def public_names(self) -> list[str]:
        """Return the names of the documented classes and functions, in source code order."""
        return [name for name in self.definitions if not name.startswith("_") and self.doc(name)]

    def statement(self, node: ast.stmt) -> str:
        """Return the lines of a statement without indentation, including any trailing comment."""
        return textwrap.dedent("\n".join(self._lines[node.lineno - 1 : node.end_lineno]))

    def with_docstring(self, node: ast.stmt, body: Sequence[ast.stmt]) -> str:
        """Return an assignment in `body` with the docstring that follows it."""
        following = body[body.index(node) + 1 :][:1]
        documented = following and isinstance(following[0], ast.Expr) and isinstance(following[0].value, ast.Constant)
        return "\n".join(self.statement(each) for each in (node, *(following if documented else ())))

    def signature(self, node: Definition) -> str:
        """Return the decorators and the signature of a definition without indentation, up to the colon."""
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        lines = self._lines[first - 1 : node.body[0].lineno]
        if node.body[0].lineno > node.lineno:
            lines.pop()
            while not lines[-1].partition("  #")[0].endswith(":"):  # a comment before the body
                lines.pop()
            return textwrap.dedent("\n".join(lines))
        return textwrap.dedent("\n".join(lines)).removesuffix(" ...")


@cache
def module_source(module: str) -> ModuleSource:
    """Return the source code of a module."""
    return ModuleSource(module)


def defining_source(module: str, name: str) -> ModuleSource:
    """Return the source of the module that defines a name.

    `module` either defines the name itself or imports it.
    """
    source = module_source(module)
    if name in source.definitions or name in source.constants:
        return source
    return module_source(getattr(importlib.import_module(module), name).__module__)


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring on one line."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + dot.strip()


def render_names(module: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the Markdown for names in a module: each class and function with a heading, followed by all constants."""
    constants: dict[str, None] = {}
    for name in names:
        source = defining_source(module, name)
        if name in source.definitions:
            yield f"\n### {name}\n\n{render_definition(source, name)}"
        else:
            constants[source.with_docstring(source.constants[name], source.tree.body)] = None
    if constants:
        yield "\n### Constants and types\n\n" + _code_block("\n".join(constants))


def render_definition(source: ModuleSource, name: str, *, constructor: bool = True) -> str:
    """Return the Markdown for a class or function: its documentation, and its code without bodies."""
    *overloads, node = source.definitions[name]
    if isinstance(node, ast.ClassDef):
        members = "\n".join(_members(source, node, constructor=constructor)).lstrip("\n")
        code = source.signature(node) + ("\n" + textwrap.indent(members, "    ") if members else " ...")
    else:
        code = "\n".join(f"{source.signature(each)} ..." for each in overloads or [node])
    return f"{source.doc(name)}\n\n{_code_block(code)}"


def _members(source: ModuleSource, node: ast.ClassDef, *, constructor: bool) -> Iterator[str]:
    """Yield the public attributes of a class with their docstrings, followed by its methods."""
    for member in node.body:
        for field in member.body if isinstance(member, ast.If) else [member]:  # under `TYPE_CHECKING`
            if any(not name.startswith("_") for name in _assigned_names(field)):
                yield source.with_docstring(field, node.body if field is member else [field])
    for member in node.body:
        if not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parameters = [*member.args.args, *member.args.kwonlyargs]
        is_constructor = constructor and member.name == "__init__" and len(parameters) > 1
        if is_constructor or member.name == "__call__" or not member.name.startswith("_"):
            doc = inspect.cleandoc(ast.get_docstring(member) or "")
            quoted = f'"""{doc}\n"""' if "\n" in doc else f'"""{doc}"""'
            yield f"\n{source.signature(member)}" + (f"\n{textwrap.indent(quoted, '    ')}" if doc else " ...")


def _assigned_names(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _code_block(text: str) -> str:
    return f"```python\n{text}\n```\n"
