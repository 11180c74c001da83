"""Checks workflow definitions: the graph, the configurations of the steps, and the expressions in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from corral.errors import FieldError, Invalid
from corral.schema.json_schema_validation import check_user_schema, json_schema_errors
from corral_core.expressions.api import Expressions
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.tasks.api import ReviewPolicy, review_policy_faults
from corral_plugins.workflows.service.graph import MAX_NESTING, Graph, GraphError, Scope, Step, build_graph
from corral_plugins.workflows.service.rendering import LOOP_ROOTS, RAW, ROOTS
from corral_plugins.workflows.service.step_conversion import slug_of
from corral_plugins.workflows.service.step_types import StepTypes
from corral_plugins.workflows.shapes import PlannedStep, StepFault

Json = dict[str, Any]
_STEP = re.compile(r"^/steps/(\d+)(/|$)")
_TEMPLATE = "{{"
LITERAL = {"loop": "body", "parallel": "branches", "switch": "cases"}
"""For each step type, the configuration field that contains steps or the names of steps.

The graph is built from this field, so no expression may compute it.
"""


class DefinitionValidator:
    """Checks definitions. The methods run in a thread, outside units of work, because parsing takes time."""

    code_reviews: CodeReviews | None

    def __init__(self, types: StepTypes, expressions: Expressions) -> None:
        self._types, self._expressions = types, expressions

    def check(self, steps: Sequence[Json], config: Json) -> Graph:
        """Return the graph of a definition. If the definition has errors, raise `Invalid` with all of them."""
        faults, graph = self.faults(steps, config)
        if faults:
            codes = {fault.code for fault in faults}
            code = next((code for code in ("cycle", "unknown_reference") if codes == {code}), None)
            if "cycle" in codes:
                code = "cycle"
            raise Invalid(faults[0].detail, code=code, errors=faults)
        assert graph is not None
        return graph

    def faults(self, steps: Sequence[Json], config: Json) -> tuple[list[FieldError], Graph | None]:
        """Return the errors in a definition, and its graph if the steps form one."""
        found: list[FieldError] = []
        if config.get("input_schema") is not None:
            try:
                check_user_schema(config["input_schema"], pointer_prefix="/config/input_schema")
            except Invalid as invalid:
                found += invalid.errors
        if config.get("review_policy") is not None:
            policy = msgspec.convert(config["review_policy"], ReviewPolicy)
            reviews = self.code_reviews is not None
            found += review_policy_faults(policy, "/config/review_policy", performs_reviews=reviews)
        structure = [fault for n, step in enumerate(steps) for fault in self._check_structure(step, f"/steps/{n}")]
        if structure:
            return found + structure, None
        try:
            graph = build_graph(steps, config, self._types.gotos)
        except GraphError as error:
            return found + error.faults, None
        found += self._check_scope(graph.root, frozenset(), graph)
        if graph.failure_step is not None:
            names = frozenset(step.name for step in graph.root.steps)
            found += self._check_step(graph.failure_step, names, graph)
        if config.get("output") is not None:
            names = frozenset(step.name for step in graph.root.steps)
            found += self._check_value(config["output"], "/config/output", ROOTS, names)
        return found, graph

    # -- structure: what the graph needs

    def _check_structure(self, step: Json, pointer: str, depth: int = 0) -> Iterator[FieldError]:
        kind = self._types.find(step["step_type"])
        if kind is None:
            detail = f"No active plugin provides the step type {step['step_type']}."
            yield FieldError(f"{pointer}/step_type", "unknown_reference", detail)
            return
        can_descend = depth < MAX_NESTING  # deeper steps are not in their stored form, and the graph refuses them
        for fault in json_schema_errors(kind.schema, step["config"], pointer_prefix=f"{pointer}/config"):
            where = fault.pointer.removeprefix(f"{pointer}/config")
            is_literal = where.split("/")[1:2] == [LITERAL.get(step["step_type"])]
            can_descend = can_descend and not is_literal
            if is_literal or not _is_computed(step["config"], where):
                yield fault
        for where, inner in inner_steps(step) if can_descend else ():
            yield from self._check_structure(inner, f"{pointer}/config{where}", depth + 1)

    # -- expressions

    def _check_scope(self, scope: Scope, outer: frozenset[str], graph: Graph) -> list[FieldError]:
        return [
            fault for step in scope.steps for fault in self._check_step(step, outer | scope.ancestors(step.name), graph)
        ]

    def _check_step(self, step: Step, names: frozenset[str], graph: Graph) -> list[FieldError]:
        kind = self._types.find(step.type)
        assert kind is not None
        roots = ROOTS | LOOP_ROOTS if step.loop is not None else ROOTS
        found = (
            [] if step.when is None else self._check_bare_expression(step.when, f"{step.pointer}/when", roots, names)
        )
        raw = RAW.get(step.type, frozenset())
        for key, value in step.config.items():
            if key not in raw:
                where = f"{step.pointer}/config/{key}"
                found += self._check_value(value, where, roots | ({"secrets"} if kind.secrets else set()), names)
        if step.type == "condition":
            where = f"{step.pointer}/config/expression"
            found += self._check_bare_expression(step.config["expression"], where, roots, names)
        if step.type == "wait" and isinstance(event := step.config.get("event"), dict) and "filter" in event:
            where = f"{step.pointer}/config/event/filter"
            found += self._expressions.check_expression(event["filter"], roots={"event"}, pointer=where)
        if "while" in step.config and step.type == "loop":
            assert step.body is not None
            inside = names | {each.name for each in step.body.steps}
            loop_roots = roots | {"index"}
            found += self._check_bare_expression(
                step.config["while"], f"{step.pointer}/config/while", loop_roots, inside
            )
        if kind.check is not None:
            prefix = f"{step.pointer}/config"
            found += [FieldError(prefix + each.pointer, each.code, each.detail) for each in kind.check(step.config)]
        for scope in step.scopes:
            found += self._check_scope(scope, names, graph)
        return found

    def _check_value(self, value: Any, pointer: str, roots: frozenset[str], names: frozenset[str]) -> list[FieldError]:
        """Return the errors in the templates of a JSON value."""
        found = self._expressions.check_template(value, roots=roots, pointer=pointer)
        return found or self._check_names(self._expressions.references(value), pointer, names)

    def _check_bare_expression(
        self, text: str, pointer: str, roots: frozenset[str], names: frozenset[str]
    ) -> list[FieldError]:
        """Return the errors in an expression that is not part of a template."""
        found = self._expressions.check_expression(text, roots=roots, pointer=pointer)
        return found or self._check_names(self._expressions.expression_references(text), pointer, names)

    def _check_names(self, used: set[str], pointer: str, names: frozenset[str]) -> list[FieldError]:
        return [
            FieldError(pointer, "unknown_reference", f"{name} is not a step that ends before this one.")
            for name in sorted(used - names)
        ]


def inner_steps(step: Json) -> Iterator[tuple[str, Json]]:
    """Yield the steps inside a loop or a parallel step, each with its JSON pointer relative to the configuration."""
    config = step["config"]
    if step["step_type"] == "loop":
        yield from ((f"/body/{n}", inner) for n, inner in enumerate(config.get("body") or ()))
    elif step["step_type"] == "parallel":
        for at, branch in enumerate(config.get("branches") or ()):
            yield from ((f"/branches/{at}/steps/{n}", inner) for n, inner in enumerate(branch.get("steps") or ()))


def all_steps(steps: Sequence[Json], pointer: str = "/steps") -> Iterator[tuple[str, Json]]:
    """Yield all steps of a definition, including steps inside other steps, each with its JSON pointer."""
    for n, step in enumerate(steps):
        here = f"{pointer}/{n}"
        yield here, step
        for where, inner in inner_steps(step):
            parent, _, at = where.rpartition("/")
            for found, each in all_steps([inner], f"{here}/config{parent}"):
                yield found.replace(f"{here}/config{parent}/0", f"{here}/config{parent}/{at}", 1), each


def definition_warnings(steps: Sequence[Json]) -> list[FieldError]:
    """Return a warning if a definition has no steps, or else a warning for each agent step without instructions."""
    if not steps:
        return [FieldError("/steps", "required", "The workflow has no steps, so it cannot run.")]
    return [
        FieldError(
            f"{pointer}/config/instructions",
            "required",
            f"The step has no instructions, so the agent gets the name of the step instead: {step['name']}",
        )
        for pointer, step in all_steps(steps)
        if step["step_type"] == "agent"
        and not step["config"].get("instructions")
        and slug_of(step.get("title") or step["name"]) == step["name"]
    ]


def with_step_names(faults: Sequence[FieldError], steps: Sequence[Json]) -> list[StepFault]:
    """Return each error with the name of the step in which it was found."""
    found = []
    for fault in faults:
        match = _STEP.match(fault.pointer)
        name = steps[int(match[1])]["name"] if match is not None and int(match[1]) < len(steps) else None
        found.append(StepFault(step=name, pointer=fault.pointer, code=fault.code, detail=fault.detail))
    return found


def planned_steps(graph: Graph) -> list[PlannedStep]:
    """Return the steps of a workflow in the order of execution, without the steps inside loops and parallel steps."""
    stages: dict[str, int] = {}
    for step in graph.root.steps:
        stages[step.name] = 1 + max((stages[name] for name in step.predecessors), default=0)
    return [
        PlannedStep(
            stage=stages[step.name],
            name=step.name,
            step_type=step.type,
            depends_on=list(step.predecessors),
            run_if=step.run_if,  # type: ignore[arg-type]  # validated when the step was saved
        )
        for step in sorted(graph.root.steps, key=lambda step: stages[step.name])
    ]


def _is_computed(config: Json, pointer: str) -> bool:
    """Return whether an expression computes the value at a pointer, or a value that contains that value."""
    value: Any = config
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            break
    return isinstance(value, str) and _TEMPLATE in value
