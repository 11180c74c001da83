"""The graph of a workflow, which defines how its steps depend on each other. The graph consists of scopes.

The steps of a workflow form one scope. The body of a loop and each branch of a parallel step are further scopes. A
definition is a list of steps in the form in which `definitions` stores them. The graph of a valid definition can always
be built; `GraphError` lists the errors in an invalid definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from corral.errors import FieldError

Json = dict[str, Any]
GOTO = "goto:"
MAX_NESTING = 5
Gotos = Callable[[str, Json], Mapping[str, str]]


class Step(msgspec.Struct, kw_only=True):
    """A step with its dependencies.

    The step waits for the steps in `depends_on`. `deciders` are the conditions and switches that have this step as a
    target; the step also waits for them. `jumps_from` are the steps that may jump to this step. `is_jump_only` means
    that the step runs only after a jump.
    """

    name: str
    title: str
    type: str
    pointer: str
    config: Json
    agent_id: str | None = None
    run_if: str = "success"
    when: str | None = None
    retry_policy: Json | None = None
    timeout_seconds: int | None = None
    on_error: str = "fail"
    depends_on: tuple[str, ...] = ()
    deciders: tuple[str, ...] = ()
    jumps_from: tuple[str, ...] = ()
    is_jump_only: bool = False
    loops: int = 0  # the number of loops around the step
    loop: str | None = None  # the innermost of these loops
    body: Scope | None = None
    branches: dict[str, Scope] = {}

    @property
    def predecessors(self) -> tuple[str, ...]:
        """The steps that must end before this step can start."""
        return tuple(dict.fromkeys((*self.depends_on, *self.deciders, *self.jumps_from)))

    @property
    def is_container(self) -> bool:
        """Whether the step consists of other steps."""
        return self.type in ("loop", "parallel")

    @property
    def scopes(self) -> list[Scope]:
        """The scopes inside the step."""
        return [*([self.body] if self.body is not None else []), *self.branches.values()]


class Scope(msgspec.Struct, kw_only=True):
    """A group of steps, each of which runs after its predecessors. No step depends on the steps in `leaves`."""

    steps: list[Step]
    by_name: dict[str, Step]
    leaves: list[str]

    def descendants(self, names: Iterable[str]) -> set[str]:
        """Return the given steps and all steps of the scope that depend on them, directly or indirectly."""
        found = {*names}
        for step in self.steps:
            if found & {*step.predecessors}:
                found.add(step.name)
        return found

    def ancestors(self, name: str) -> set[str]:
        """Return the steps of the scope that a step depends on, directly or indirectly."""
        found: set[str] = {*self.by_name[name].predecessors}
        for step in reversed(self.steps):
            if step.name in found:
                found |= {*step.predecessors}
        return found


class Graph(msgspec.Struct, kw_only=True):
    """The graph of a definition. `failure_step` runs when the run fails, and is not part of the scope `root`."""

    root: Scope
    config: Json
    steps: dict[str, Step]
    failure_step: Step | None = None


class GraphError(Exception):
    """Raised if the steps of a definition do not form a valid graph. Contains the errors."""

    def __init__(self, faults: Sequence[FieldError]) -> None:
        self.faults = list(faults)
        super().__init__("; ".join(fault.detail for fault in self.faults))


def no_gotos(type: str, config: Json) -> Mapping[str, str]:
    """Return no jump targets. Used by callers that do not know the step types."""
    return {}


def build_graph(steps: Sequence[Json], config: Json, gotos: Gotos = no_gotos) -> Graph:
    """Return the graph of a definition. `gotos` returns the steps that a step with a given configuration may jump to.

    Raise `GraphError` if a name is used twice, if a step refers to an unknown step, if steps form a cycle, or if steps
    are nested too deeply.
    """
    return _Builder(gotos).build(steps, config)


class _Builder:
    def __init__(self, gotos: Gotos) -> None:
        self._gotos = gotos
        self._faults: list[FieldError] = []
        self._steps: dict[str, Step] = {}

    def build(self, steps: Sequence[Json], config: Json) -> Graph:
        wanted = config.get("on_failure_step")
        failing = [(n, step) for n, step in enumerate(steps) if wanted is not None and step["name"] == wanted]
        normal = [(n, step) for n, step in enumerate(steps) if wanted is None or step["name"] != wanted]
        if wanted is not None and not failing:
            self._fault("/config/on_failure_step", "unknown_reference", f"There is no step named {wanted}.")
        root = self._scope(normal, "/steps", loop=(), depth=0)
        failure = self._scope(failing, "/steps", loop=(), depth=0) if failing else None
        if self._faults:
            raise GraphError(self._faults)
        return Graph(
            root=root, config=config, steps=self._steps, failure_step=failure.steps[0] if failure is not None else None
        )

    def _fault(self, pointer: str, code: str, detail: str) -> None:
        self._faults.append(FieldError(pointer, code, detail))

    def _scope(self, steps: Sequence[tuple[int, Json]], pointer: str, *, loop: tuple[str, ...], depth: int) -> Scope:
        found: dict[str, Step] = {}
        for n, given in steps:
            step = self._step(given, f"{pointer}/{n}", loop=loop, depth=depth)
            if step.name in self._steps:
                self._fault(f"{pointer}/{n}/name", "not_unique", f"Two steps are named {step.name}.")
            self._steps[step.name] = found[step.name] = step
        self._link([given for _, given in steps], found)
        ordered = self._sorted(found, {given["name"]: given["order"] for _, given in steps})
        needed = {name for step in ordered for name in step.predecessors}
        leaves = [step.name for step in ordered if step.name not in needed]
        return Scope(steps=ordered, by_name=found, leaves=leaves)

    def _step(self, given: Json, pointer: str, *, loop: tuple[str, ...], depth: int) -> Step:
        same = ("agent_id", "run_if", "when", "retry_policy", "timeout_seconds", "on_error")
        config = given["config"]
        step = Step(
            name=given["name"],
            title=given.get("title") or given["name"],
            type=given["step_type"],
            pointer=pointer,
            loops=len(loop),
            loop=loop[-1] if loop else None,
            config=config,
            **{name: given[name] for name in same if name in given},
        )
        if step.is_container and depth >= MAX_NESTING:
            self._fault(f"{pointer}/config", "too_large", f"Steps can be nested at most {MAX_NESTING} levels deep.")
            return step
        if step.type == "loop":
            inner = [*enumerate(config.get("body") or ())]
            step.body = self._scope(inner, f"{pointer}/config/body", loop=(*loop, step.name), depth=depth + 1)
        elif step.type == "parallel":
            for n, branch in enumerate(config.get("branches") or ()):
                inner = [*enumerate(branch.get("steps") or ())]
                where = f"{pointer}/config/branches/{n}/steps"
                step.branches[branch["name"]] = self._scope(inner, where, loop=loop, depth=depth + 1)
        return step

    # -- dependencies

    def _link(self, given: Sequence[Json], found: Mapping[str, Step]) -> None:
        for step in found.values():
            for pointer, name in branch_targets(step):
                target = self._target(step, f"{step.pointer}/config{pointer}", name, found)
                if target is not None:
                    target.deciders = (*target.deciders, step.name)
            jumps = {f"/config{pointer}": name for pointer, name in self._gotos(step.type, step.config).items()}
            if step.on_error.startswith(GOTO):
                jumps["/on_error"] = step.on_error.removeprefix(GOTO)
            for pointer, name in jumps.items():
                target = self._target(step, f"{step.pointer}{pointer}", name, found)
                if target is not None:
                    target.jumps_from = (*target.jumps_from, step.name)
        by_order: dict[int, list[str]] = {}
        for each in given:
            by_order.setdefault(each["order"], []).append(each["name"])
        for each in given:
            step = found[each["name"]]
            step.depends_on = self._dependencies(each, step, found, by_order)
            step.is_jump_only = bool(step.jumps_from) and each["depends_on"] == [] and not step.deciders

    def _target(self, step: Step, pointer: str, name: str, found: Mapping[str, Step]) -> Step | None:
        if name == step.name:
            self._fault(pointer, "cycle", f"The steps form a cycle: {name} -> {name}.")
        elif name not in found:
            self._fault(pointer, "unknown_reference", f"There is no step named {name} next to this step.")
        else:
            return found[name]
        return None

    def _dependencies(
        self, given: Json, step: Step, found: Mapping[str, Step], by_order: Mapping[int, list[str]]
    ) -> tuple[str, ...]:
        """Return the dependencies of a step.

        Without `depends_on`, a step depends on the steps with the next lower order. The target of a condition depends
        only on this condition, because the condition's other target, which is skipped, may have a lower order.
        """
        if given["depends_on"] is None:
            lower = [order for order in by_order if order < given["order"]]
            return tuple(by_order[max(lower)]) if lower and not step.deciders else ()
        for n, name in enumerate(given["depends_on"]):
            self._target(step, f"{step.pointer}/depends_on/{n}", name, found)
        return tuple(dict.fromkeys(name for name in given["depends_on"] if name in found and name != step.name))

    def _sorted(self, found: Mapping[str, Step], order: Mapping[str, int]) -> list[Step]:
        """Return the steps sorted so that each step follows its predecessors.

        Steps in a cycle are reported and omitted.
        """
        waiting = sorted(found.values(), key=lambda step: order[step.name])
        done: dict[str, Step] = {}
        while waiting:
            ready = [step for step in waiting if all(name in done for name in step.predecessors)]
            if not ready:
                path = _cycle_among({step.name: step for step in waiting})
                first = found[path[0]]
                self._fault(f"{first.pointer}/depends_on", "cycle", f"The steps form a cycle: {' -> '.join(path)}.")
                break
            done |= {step.name: step for step in ready}
            waiting = [step for step in waiting if step.name not in done]
        return list(done.values())


def _cycle_among(steps: Mapping[str, Step]) -> list[str]:
    """Return the names of the steps of a cycle in order, with the first name repeated at the end.

    Each of the given steps must wait for another one of them, so that there is a cycle.
    """
    path = [next(iter(steps))]
    while True:
        name = next(name for name in steps[path[-1]].predecessors if name in steps)
        if name in path:
            return list(reversed([*path[path.index(name) :], name]))
        path.append(name)


def branch_targets(step: Step) -> Iterator[tuple[str, str]]:
    """Yield the names of the steps that a condition or a switch can choose, each with its JSON pointer."""
    if step.type == "condition":
        for key in ("if_true", "if_false"):
            yield from ((f"/{key}/{n}", name) for n, name in enumerate(step.config.get(key) or ()))
    elif step.type == "switch":
        for at, case in enumerate(step.config.get("cases") or ()):
            yield from ((f"/cases/{at}/steps/{n}", name) for n, name in enumerate(case.get("steps") or ()))
        yield from ((f"/default/{n}", name) for n, name in enumerate(step.config.get("default") or ()))


def taken_targets(step: Step, output: Any) -> list[str]:
    """Return the names of the steps that a completed condition or switch has chosen."""
    if step.type == "condition":
        return list(step.config.get("if_true" if output["result"] else "if_false") or ())
    case = output["case"]
    return list((step.config.get("default") if case is None else step.config["cases"][case].get("steps")) or ())
