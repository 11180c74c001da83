"""Workflow steps that run code, and the task executor for all steps that consist of a single tool call.

The step type `code` is defined here; the `tools` plugin contributes the step type `tool`. The tool call needs the same
permission as a call by an agent, because it is made under the lease of an agent's task.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from corral.errors import FieldError
from corral.events.log import LoggedEvent
from corral_plugins.tools.api import Tools
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepTasks, StepType, StepWait
from corral_plugins.workflows.models import StepRun
from corral_plugins.workflows.service.step_types import object_schema

Json = dict[str, Any]
LANGUAGE = "^[a-z][a-z0-9_]{0,39}$"
DISABLED = "The plugin tools is not active."


class CodeSteps:
    """Steps of the type `code`: a worker runs the code with the tool `<language>.run`."""

    tasks: StepTasks | None
    tools: Tools | None

    def definition(self) -> StepType:
        """Return the definition of the step type."""
        return StepType(
            type="code",
            title="Run code on a worker",
            schema=object_schema(
                {
                    "language": {
                        "type": "string",
                        "pattern": LANGUAGE,
                        "patternErrorMessage": "the name of a language, such as python, of a-z, 0-9 and _",
                    },
                    "source": {"type": "string", "minLength": 1, "maxLength": 32_000},
                    "input": {},
                },
                "language",
                "source",
            ),
            dispatch=self.dispatch,
            resolve=self.resolve,
            cancel=self.cancel,
            check=self.check,
            own_retries=True,
        )

    def check(self, config: Json) -> list[FieldError]:
        """Return an error if the `tools` plugin is not active, because it decides whether tool calls are allowed."""
        return [] if self.tools is not None else [FieldError("/language", "not_allowed", DISABLED)]

    def dispatch(self, context: StepContext) -> StepWait:
        """Create a task that requires both an agent that may use the tool and a worker that offers it.

        Raise `StepFailure` if the plugin `tools` is not active.
        """
        if self.tools is None:
            raise StepFailure("plugin_disabled", DISABLED, retryable=False)
        assert self.tasks is not None
        name, arguments = code_call(context.config)
        fields = {"input": {"tool": name, "arguments": arguments}, "required_tools": [name], "allowed_tools": [name]}
        return self.tasks.create(context, fields)

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        """End the step if its task has ended. The result of the task becomes the output of the step.

        Return None if the task has not ended.
        """
        assert self.tasks is not None
        return self.tasks.resolve(context, event)

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        """Cancel the task of the step."""
        assert self.tasks is not None
        return self.tasks.cancel(context, reason)


def code_call(config: Json) -> tuple[str, Json]:
    """Return the tool that runs the code of a step, and the arguments of the call.

    Python code receives the input in the variable `input`, and shell code receives it as JSON in the variable `INPUT`.
    In both cases, the input is part of the code, so that people who have to approve the call can see it. Code in other
    languages receives the input as the argument `input`.
    """
    language, source = config["language"], config["source"]
    if "input" not in config:
        return f"{language}.run", {"command" if language == "shell" else "code": source}
    text = json.dumps(config["input"])
    if language == "python":
        return "python.run", {"code": f"import json\ninput = json.loads({text!r})\n{source}"}
    if language == "shell":
        return "shell.run", {"command": f"INPUT={shlex.quote(text)}\n{source}"}
    return f"{language}.run", {"code": source, "input": config["input"]}


def _code_tool_call(config: Json) -> Json:
    tool, arguments = code_call(config)
    return {"type": "tool", "tool": tool, "arguments": arguments, "returns": "json"}


def _tool_call(config: Json) -> Json:
    return {"type": "tool", "tool": config["tool"], "arguments": config.get("arguments", {})}


EXECUTORS: Mapping[str, Callable[[Json], Json]] = {"code": _code_tool_call, "tool": _tool_call}


class ToolTaskExecutor:
    """The task executor for `code` and `tool` steps, which tells the worker which tool call to make.

    The methods run in units of work.
    """

    def handles(self, task: Json) -> bool:
        """Return whether a task does the work of a `code` or `tool` step."""
        return task["step_run_id"] is not None and _step_of(task).type in EXECUTORS

    def prepare(self, task: Json) -> Json:
        """Return the tool call that the worker makes for a task."""
        row = _step_of(task)
        return EXECUTORS[row.type](row.input)


def _step_of(task: Json) -> Any:
    return StepRun.select(StepRun.type, StepRun.input).where(StepRun.id == task["step_run_id"]).get()
