"""Expressions: their values, their faults, and templates. None of this depends on the database."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from corral_core.expressions.api import TemplateError
from corral_core.expressions.service.expressions import ExpressionsService
from corral_core.expressions.service.helper_process_client import HelperProcess

ROOTS = ("input", "steps", "run", "context")
DATA: dict[str, Any] = {
    "input": {"n": 3, "f": 1.5, "s": "héé", "l": [3, 1, 2], "none": None, "yes": True, "a b": {"c": [{"d": 7}]}},
    "steps": {"first": {"output": {"x": 1}, "status": "completed"}, "second-step": {"output": "two"}},
    "run": {"id": "r"},
    "context": {"text": "a {{ input.n }} b"},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expressions() -> AsyncIterator[ExpressionsService]:
    process = HelperProcess()
    yield ExpressionsService(process)
    await process.stop()


pytestmark = [pytest.mark.one_engine, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("input.n + 1", 4),
        ("double(input.n) * input.f", 4.5),
        ("input.n > input.f && input.n == 3.0", True),
        ("has(input.gone) ? input.gone : 'fallback'", "fallback"),
        ('get(input, "a b.c[0].d", 0)', 7),
        ("get(input, 'a b.c[1].d', 0)", 0),
        ("get(input.none, 'x', 'f')", "f"),
        ('steps["second-step"].output', "two"),
        ("size(input.s)", 3),
        ("input.s.size()", 3),
        ("string(input.yes) + string(1) + string([1])", "true1[1]"),
        ("input.l.map(x, x * 2)", [6, 2, 4]),
        ("input.l.filter(input, input > 1)", [3, 2]),
        ("input.l.all(x, x > 0) && input.l.exists(x, x == 1) && input.l.exists_one(x, x == 1)", True),
        ("input.l.filter(x, x > 1).map(x, string(x))", ["3", "2"]),
        ("json({'a': [1, null]})", '{"a":[1,null]}'),
        ("parse_json('{\"a\": 1}').a", 1),
        ("upper(lower('Ab')) + trim(' x ')", "ABx"),
        ("join(split('a,b', ','), '-')", "a-b"),
        ("replace('aXbX', 'X', '')", "ab"),
        ("keys({'b': 1, 'a': 2})", ["a", "b"]),
        ("values({'b': 1, 'a': 2})", [2, 1]),
        ("sum(input.l) + min(input.l) + max(1, 9)", 16),
        ("round(2.5)", 3),
        ("round(-2.5)", -3),
        ("round(1.005 + 0.001, 2)", 1.01),
        ("'abc'.matches('^a.c$')", True),
        ("timestamp('2026-01-01T00:00:00Z') + duration('90m')", "2026-01-01T01:30:00.000Z"),
        ("now() == now()", True),
        ("input.none == null", True),
        ("1 in input.l && 'n' in input", True),
        ("5 / 2", 2),
    ],
)
async def test_an_expression_gives_its_value(expressions: ExpressionsService, text: str, value: Any) -> None:
    assert expressions.check_expression(text, roots=ROOTS, pointer="") == []
    result = await expressions.evaluate(text, DATA)
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("input.gone", 7, "no key 'gone'"),
        ("1 + input['gone']", 11, "no key 'gone'"),
        ("int('x')", 1, "int() needs a whole number, such as 42."),
        ("duration('x')", 1, "duration() needs a duration, such as 90s or 1h30m."),
        ("input.n + 1.5", 1, "types"),
        ("input.l[7]", 8, "not in the list"),
        ("1 / 0", 3, "Division by zero"),
        ("string(1.0 / 0.0)", 1, "a number that is not finite"),
        ("json({'a': [0.0 / 0.0]})", 1, "a number that is not finite"),
        ("timestamp('9999-12-31T23:59:59-14:00')", 1, "outside of the years 1 to 9999"),
        ("[1].map(x, timestamp('0001-01-01T00:00:00+14:00'))", 1, "outside of the years 1 to 9999"),
        ("1.0 / 0.0", 1, "infinite"),
        ("9223372036854775807 + 1", 21, "64-bit"),
        ("input.s.x", 1, "types"),
        ("parse_json('{')", 1, "valid JSON"),
        ("sum(['a'])", 1, "list of numbers"),
        ("'a'.matches('(')", 5, "The regular expression of matches() is not valid: unclosed group."),
        ("matches('a', 'b')", 1, "called in this way"),
        ("{1: 2}", 1, "not strings"),
        ("'\\x00'", 1, "U+0000"),
    ],
)
async def test_a_failure_names_the_expression_and_the_position(
    expressions: ExpressionsService, text: str, position: int, says: str
) -> None:
    with pytest.raises(TemplateError) as raised:
        await expressions.evaluate(text, DATA)
    assert raised.value.expression == text
    assert raised.value.position == position
    assert says in raised.value.message
    assert raised.value.code == "template_error"
    assert raised.value.status == 422


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("1 +", "Syntax error: the expression is not complete."),
        ("input.n ? 1", "Syntax error: the expression is not complete."),
        ("(1", "Syntax error: ) is missing."),
        ("input..n", "Syntax error: .. is not expected here."),
        ("input.n == 1 and true", "Syntax error: and is not expected here; write && instead of and."),
        ("not true", "Syntax error: true is not expected here; write ! instead of not."),
        ("if true", "Syntax error: the word if is reserved and cannot be a name."),
        ("input.n = 1", "to compare, write =="),
        ("'abc", "not closed"),
        ("payload.x", "no name 'payload'"),
        ("input.l.map(x, x) + x", "no name 'x'"),
        ("frobnicate(1)", "no function frobnicate"),
        ("input.l.map(x, input.l.map(y, y))", "inside another macro"),
        ("Message{a: 1}", "not a type"),
        ("1 // comment", "Comments"),
        ("input # n", "'#'"),
        ("(" * 33 + "1" + ")" * 33, "32 levels"),
        ("1" + " " * 4096, "4096 bytes"),
        ("'é" + "é" * 2100 + "'", "4096 bytes"),
        ("secrets.KEY", "no name 'secrets'"),
        ("optional.of(1)", "no function of"),
        ("input.__class__()", "no function __class__"),
        (".payload", "no name 'payload'"),
    ],
)
async def test_a_check_tells_what_is_wrong(expressions: ExpressionsService, text: str, says: str) -> None:
    (first, *_) = expressions.check_expression(text, roots=ROOTS, pointer="/filter")
    assert (first.pointer, first.code) == ("/filter", "template_error")
    assert says in first.detail
    with pytest.raises(TemplateError):
        await expressions.evaluate(text, DATA)


async def test_workflows_7_a_single_expression_keeps_its_type_and_text_around_it_makes_text(
    expressions: ExpressionsService,
) -> None:
    template = {
        "{{ key }}": "{{ input.n }}",
        "text": "n={{ input.n }}, {{input.f}}, {{ input.yes }}, [{{ input.none }}], {{ input.l }}",
        "braces": '{{ "{{" }}{{ "}}" }}',
        "object": "{{ {'a': {'b': 1}} }}",
        "list": ["{{ input.l }}", 5, None, "plain } text { }}"],
        "data": "{{ context.text }}",
    }
    assert expressions.check_template(template, roots=ROOTS, pointer="/config") == []
    assert await expressions.render(template, DATA) == {
        "{{ key }}": 3,
        "text": "n=3, 1.5, true, [], [3,1,2]",
        "braces": "{{}}",
        "object": {"a": {"b": 1}},
        "list": [[3, 1, 2], 5, None, "plain } text { }}"],
        "data": "a {{ input.n }} b",  # never parsed again
    }
    with pytest.raises(TemplateError) as raised:
        await expressions.render({"x": ["a {{ input.gone }}"]}, DATA)
    assert (raised.value.expression, raised.value.position) == ("input.gone", 7)


async def test_a_template_is_checked_with_a_pointer_to_each_fault(expressions: ExpressionsService) -> None:
    template = {"a/b": ["ok {{ input.n }}", "{{ payload.x }}"], "open": "{{ 'a' ", "c": "{{ input.n"}
    faults = expressions.check_template(template, roots=ROOTS, pointer="/config")
    assert [fault.pointer for fault in faults] == ["/config/a~1b/1", "/config/open", "/config/c"]
    assert "never closed" in faults[1].detail


async def test_references_are_the_names_of_steps(expressions: ExpressionsService) -> None:
    template = ["{{ steps.first.output.x }} {{ get(steps['second-step'], 'output') }}", {"a": "{{ input.steps.no }}"}]
    assert expressions.references(template) == {"first", "second-step"}
    assert expressions.expression_references("has(steps.third.output) && steps.first.status == 'x'") == {
        "first",
        "third",
    }


async def test_a_secret_stands_alone_in_its_braces_and_only_where_it_is_allowed(
    expressions: ExpressionsService,
) -> None:
    template = {"headers": {"Authorization": "Bearer {{ secrets.API_KEY-2 }}", "X": "{{ context.attack }}"}}
    data = {"context": {"attack": "{{ secrets.OTHER }}"}}
    assert expressions.check_template(template, roots=(*ROOTS, "secrets"), pointer="") == []
    assert len(expressions.check_template(template, roots=ROOTS, pointer="")) == 1
    for text in ("{{ secrets.A + 'x' }}", "{{ [secrets.A] }}", "{{ secrets }}", "{{ secrets['A'] }}"):
        (fault,) = expressions.check_template(text, roots=(*ROOTS, "secrets"), pointer="/x")
        assert "alone in its braces" in fault.detail
        with pytest.raises(TemplateError):
            await expressions.render(text, data, secrets={"A": "v"})
    assert expressions.secret_names(template) == {"API_KEY-2"}
    rendered = await expressions.render(template, data, secrets={"API_KEY-2": "v", "OTHER": "leaked"})
    assert rendered["headers"] == {"Authorization": "Bearer v", "X": "{{ secrets.OTHER }}"}
    shown = await expressions.render(template, data)
    assert shown["headers"]["Authorization"] == "Bearer {{ secrets.API_KEY-2 }}"


async def test_a_condition_must_give_a_boolean(expressions: ExpressionsService) -> None:
    assert await expressions.evaluate("input.n == 3", DATA, boolean=True) is True
    with pytest.raises(TemplateError, match="true or false"):
        await expressions.evaluate("input.n", DATA, boolean=True)


async def test_only_the_data_that_an_expression_reaches_counts(expressions: ExpressionsService) -> None:
    big = {"output": "x" * 2_000_000}
    data = {"input": {"n": 1}, "steps": {"big": big, "small": {"output": 1}}}
    assert await expressions.evaluate("input.n + steps.small.output", data) == 2
    for text in ("size(steps.big.output)", "size(steps)"):
        with pytest.raises(TemplateError, match="larger than 1 MiB"):
            await expressions.evaluate(text, data)
    with pytest.raises(TemplateError, match="256 KiB"):
        await expressions.evaluate("input.s", {"input": {"s": "x" * 300_000}})


async def test_the_helper_process_is_replaced_after_its_death(expressions: ExpressionsService) -> None:
    assert await expressions.evaluate("input.l.map(x, x)", DATA) == [3, 1, 2]
    process: Any = expressions._process._process
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    assert await expressions.evaluate("input.l.map(x, x)", DATA) == [3, 1, 2]


async def test_the_helper_process_has_none_of_our_variables(expressions: ExpressionsService) -> None:
    await expressions.evaluate("input.l.map(x, x)", DATA)
    process: Any = expressions._process._process
    assert set(psutil.Process(process.pid).environ()) <= {"PYTHONPATH", "LANG", "LC_CTYPE"}
