"""The workflow step `tool`: a task whose worker makes one tool call instead of asking a model.

The task's agent makes the call under the lease of the task. The call is therefore checked, held for approval and
recorded like any other call of that agent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from corral.errors import FieldError
from corral.events.log import LoggedEvent
from corral_plugins.tools.api import Json
from corral_plugins.workflows.api import StepContext, StepResult, StepTasks, StepType, StepWait

SECRET = re.compile(r"\{\{\s*secrets\b")
SENDERS = ("http.fetch", "http.request")
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "tool": {"type": "string", "minLength": 3, "maxLength": 200, "description": "The name of the tool."},
        "arguments": {"type": "object", "description": "The arguments of the call."},
    },
    "required": ["tool"],
    "additionalProperties": False,
}


class ToolStep:
    """The workflow step `tool`. The service `tasks` is set after startup."""

    tasks: StepTasks | None

    def definition(self) -> StepType:
        """Return the definition of the workflow step."""
        return StepType(
            type="tool",
            title="Call a tool",
            schema=SCHEMA,
            dispatch=self.dispatch,
            resolve=self.resolve,
            cancel=self.cancel,
            check=check_config,
            own_retries=True,
            secrets=True,
        )

    def dispatch(self, context: StepContext) -> StepWait:
        """Create a task for the step. The task can be assigned only to agents that may use the tool."""
        assert self.tasks is not None
        name, arguments = context.config["tool"], context.config.get("arguments", {})
        fields = {"input": {"tool": name, "arguments": arguments}, "required_tools": [name], "allowed_tools": [name]}
        return self.tasks.create(context, fields)

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        """End the step if its task has ended. The tool's result becomes the result of the step."""
        assert self.tasks is not None
        return self.tasks.resolve(context, event)

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        """Cancel the task of the step."""
        assert self.tasks is not None
        return self.tasks.cancel(context, reason)


def check_config(config: Json) -> list[FieldError]:
    """Return an error for each string in the arguments that refers to a secret where secrets are not allowed."""
    arguments = config.get("arguments")
    is_sender = config.get("tool") in SENDERS
    if not isinstance(arguments, dict):
        return []
    detail = "Only the values of headers of http.fetch and http.request may contain secrets."
    return [
        FieldError(f"/arguments{pointer}", "not_allowed", detail)
        for pointer, text in _texts(arguments)
        if SECRET.search(text) and not (is_sender and pointer.startswith("/headers/"))
    ]


def _texts(value: Any, pointer: str = "") -> Iterator[tuple[str, str]]:
    """Yield the strings in a JSON value, each with its JSON pointer."""
    if isinstance(value, str):
        yield pointer, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(each, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(value, list):
        for n, each in enumerate(value):
            yield from _texts(each, f"{pointer}/{n}")
