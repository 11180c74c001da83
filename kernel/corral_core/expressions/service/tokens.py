"""Scans CEL expressions token by token to find the names and functions they use and any forbidden constructs.

The CEL library parses the syntax, but does not report the positions of names, the variables that macros bind, or
whether macros are nested. All of these can be determined from the tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_BYTES = 4096
MAX_DEPTH = 32
MACROS = frozenset({"map", "filter", "all", "exists", "exists_one"})
DATE_PARTS = frozenset(
    {
        *("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear"),
        *("getHours", "getMinutes", "getSeconds", "getMilliseconds"),
    }
)
FUNCTIONS = frozenset(
    {
        *("size", "has", "matches", "startsWith", "endsWith", "contains", "int", "double", "string"),
        *("timestamp", "duration", "get", "json", "parse_json", "lower", "upper", "trim", "split", "join", "replace"),
        *("keys", "values", "sum", "min", "max", "round", "now"),
        *DATE_PARTS,
    }
)
REPLACED = {"size": "Size", "string": "String"}
"""Functions of the CEL library that Corral replaces, mapped to names of the same length, so that offsets do not change.

The library counts the bytes of a string instead of its characters, and cannot convert a boolean to a string. It does
not allow replacing its built-in functions.
"""
KEYWORDS = frozenset({"true", "false", "null", "in"})
_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<string>[bB]?[rR](?:'''.*?'''|\"\"\".*?\"\"\"|'[^'\n]*'|"[^"\n]*")
        |[bB]?(?:'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"))
    |(?P<number>0[xX][0-9a-fA-F]+[uU]?|(?:\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?[uU]?)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>&&|\|\||[<>=!]=|[-+*/%<>!?:.,()\[\]{}])""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_HINTS = {  # for the first character that begins no token
    "/": "Comments are not allowed.",
    "=": "Unexpected character '='; to compare, write ==.",
    "&": "Unexpected character '&'; write && instead.",
    "|": "Unexpected character '|'; write || instead.",
    "'": "The string that begins here is not closed in the same line.",
    '"': "The string that begins here is not closed in the same line.",
}
_OPENING, _CLOSING = {"(": ")", "[": "]", "{": "}"}, frozenset(")]}")
_SECRET = re.compile(r"\s*secrets\.([A-Za-z][A-Za-z0-9_.-]{0,127})\s*")  # such names are no identifiers
_SIMPLE_STRING = re.compile(r"""(['"])([^'"\\\n]*)\1""")


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an expression. `start` is the token's offset in the scanned text."""

    kind: str
    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Fault:
    """An error in an expression, with its offset."""

    offset: int
    message: str


@dataclass(slots=True)
class Analysis:
    """Properties of an expression, as determined from its tokens."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    roots: dict[str, int] = field(default_factory=dict)
    """The names of the variables that no macro binds, each with the offset of its first use."""
    functions: Counter[str] = field(default_factory=Counter)
    """The number of calls to each function."""
    has_macros: bool = False
    additions: int = 0
    steps: set[str] = field(default_factory=set)
    uses_all_steps: bool = False
    """Whether the expression may read any step, because it uses `steps` without selecting one by a constant name."""
    secret: str | None = None
    """The name of the secret if the expression is exactly `secrets.NAME`."""
    faults: list[Fault] = field(default_factory=list)

    @property
    def program(self) -> str:
        """The expression, with the functions that Corral replaces renamed as in `REPLACED`."""
        text = self.text
        for here, after in zip(self.tokens, self.tokens[1:], strict=False):
            if here.text in REPLACED and here.kind == "name" and after.text == "(":
                text = text[: here.start] + REPLACED[here.text] + text[here.start + len(here.text) :]
        return text


def scan(text: str, start: int = 0) -> Iterator[Token]:
    """Yield the tokens of `text` from the offset `start`, without white space.

    Stop after a token of the kind `unknown`.
    """
    offset = start
    while offset < len(text):
        if text.startswith("//", offset) or not (match := _TOKEN.match(text, offset)):
            yield Token("unknown", text[offset], offset)
            return
        if match.lastgroup != "space":
            yield Token(str(match.lastgroup), match[0], offset)
        offset = match.end()


def string_content(token: Token) -> str | None:
    """Return the content of a string literal that has no escape sequences, or None for any other token."""
    match = _SIMPLE_STRING.fullmatch(token.text) if token.kind == "string" else None
    return match[2] if match else None


def analyse(text: str) -> Analysis:
    """Analyse the tokens of an expression."""
    found = Analysis(text)
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        found.faults.append(Fault(0, f"The expression is longer than {MAX_BYTES} bytes."))
        return found
    found.tokens = list(scan(text))
    if not found.tokens:
        found.faults.append(Fault(0, "The expression is empty."))
    elif found.tokens[-1].kind == "unknown":
        last = found.tokens.pop()
        found.faults.append(Fault(last.start, _HINTS.get(last.text, f"Unexpected character {last.text!r}.")))
    _Walk(found).run()
    if match := _SECRET.fullmatch(text):
        found.secret = match[1]
    return found


class _Walk:
    """Analyses the tokens of an expression in a single pass, with a stack of open brackets."""

    def __init__(self, found: Analysis) -> None:
        self._found, self._tokens = found, found.tokens
        self._open: list[tuple[str, bool, str | None]] = []  # the closing bracket, is it a macro, its variable

    def run(self) -> None:
        """Process all tokens and record the properties of the expression."""
        for index, token in enumerate(self._tokens):
            if token.text in _OPENING:
                self._open_bracket(index, token)
            elif token.text in _CLOSING:
                if self._open:
                    self._open.pop()
            elif token.text == "+":
                self._found.additions += 1
            elif token.kind == "name":
                self._read_name(index, token)

    def _text(self, index: int) -> str:
        return self._tokens[index].text if 0 <= index < len(self._tokens) else ""

    def _is_member(self, index: int) -> bool:
        """Return whether the name at `index` is a member access, that is, follows a dot after a value."""
        if self._text(index - 1) != "." or index < 2:
            return False
        before = self._tokens[index - 2]
        return before.kind in ("name", "string", "number") or before.text in _CLOSING

    def _open_bracket(self, index: int, token: Token) -> None:
        is_macro = token.text == "(" and self._text(index - 1) in MACROS and self._is_member(index - 1)
        if is_macro:
            self._found.has_macros = True
            if any(macro for _, macro, _ in self._open):
                self._fault(token, "A macro such as map or filter must not be used inside another macro.")
        variable = self._text(index + 1) if is_macro and self._text(index + 2) == "," else None
        self._open.append((_OPENING[token.text], is_macro, variable))
        if len(self._open) == MAX_DEPTH + 1:
            self._fault(token, f"The expression has more than {MAX_DEPTH} levels of brackets.")

    def _read_name(self, index: int, token: Token) -> None:
        if token.text in KEYWORDS:
            return
        if self._text(index + 1) == "(":
            self._read_function(index, token)
        elif self._text(index + 1) == "{":
            self._fault(token, f"{token.text} is not a type; write an object as {{'key': value}}.")
        elif not self._is_member(index) and not any(token.text == bound for _, _, bound in self._open):
            self._found.roots.setdefault(token.text, token.start)
            if token.text == "steps":
                self._record_step(index)

    def _read_function(self, index: int, token: Token) -> None:
        self._found.functions[token.text] += 1
        if token.text in MACROS and self._is_member(index):
            return
        if token.text not in FUNCTIONS:
            self._fault(token, f"There is no function {token.text}.")

    def _record_step(self, index: int) -> None:
        after = self._tokens[index + 2] if index + 2 < len(self._tokens) else None
        if after is not None and self._text(index + 1) == "." and after.kind == "name":
            self._found.steps.add(after.text)
        elif after is not None and self._text(index + 1) == "[" and (name := string_content(after)) is not None:
            self._found.steps.add(name)
        else:
            self._found.uses_all_steps = True

    def _fault(self, token: Token, message: str) -> None:
        self._found.faults.append(Fault(token.start, message))
