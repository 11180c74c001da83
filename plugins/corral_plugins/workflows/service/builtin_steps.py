"""The built-in step types, which create tasks, call models and HTTP services, ask people, or start other workflows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from corral import clock
from corral.egress.client import Egress
from corral.egress.guard import EgressBlocked
from corral.errors import FieldError
from corral.events.log import LoggedEvent
from corral.plugin import Provide
from corral.schema.json_schema_validation import json_schema_errors
from corral_plugins.circuit_breakers.api import Breakers, Verdict, judge_status
from corral_plugins.cost.api import BudgetRefused
from corral_plugins.llm.api import LLM
from corral_plugins.workflows.api import (
    RunRequest,
    StepContext,
    StepFailure,
    StepResult,
    StepTasks,
    StepType,
    StepWait,
    Workflows,
)
from corral_plugins.workflows.service.code_steps import CodeSteps
from corral_plugins.workflows.service.step_types import object_schema

if TYPE_CHECKING:
    import httpx2

Json = dict[str, Any]
T = TypeVar("T")
TEXT: Json = {"type": "string", "maxLength": 65536}
TOOLS: Json = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 200}, "maxItems": 100}
MIB = 1024 * 1024
HTTP_SECONDS = 30
MAX_HTTP_SECONDS = 600
HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
RESERVED_HEADERS = frozenset({"connection", "content-length", "host", "te", "trailer", "transfer-encoding", "upgrade"})


def _require_set(service: T | None) -> T:
    """Return a service of a plugin that this plugin requires.

    The service has always been set before the first step runs.
    """
    assert service is not None
    return service


class AgentSteps:
    """Steps of the type `agent`: the step creates a task, and the result of the task is the output of the step."""

    tasks: StepTasks | None

    def definition(self) -> StepType:
        """Return the definition of the step type."""
        return StepType(
            type="agent",
            title="Let an agent work on a task",
            schema=object_schema(
                {
                    "instructions": TEXT,
                    "input": {"type": "object"},
                    "required_tools": TOOLS,
                    "allowed_tools": {"anyOf": [TOOLS, {"type": "null"}]},
                    "output_schema": {"type": "object"},
                    "priority": {"enum": ["low", "medium", "high", "critical"]},
                    "agent_role": {
                        "type": "string",
                        "pattern": "^[a-z0-9][a-z0-9_-]{0,63}$",
                        "patternErrorMessage": "1 to 64 of a-z, 0-9, - and _, beginning with a letter or digit",
                    },
                    "max_cost_usd": {"type": "number", "minimum": 0, "maximum": 1_000_000_000},
                }
            ),
            dispatch=self.dispatch,
            resolve=self.resolve,
            cancel=self.cancel,
            own_retries=True,
        )

    def dispatch(self, context: StepContext) -> StepWait:
        """Create the task that does the work of the step."""
        return _require_set(self.tasks).create(context, {"instructions": context.title, **context.config})

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        """End the step if its task has ended. The result of the task becomes the output of the step.

        Return None if the task has not ended.
        """
        return _require_set(self.tasks).resolve(context, event)

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        """Cancel the task of the step."""
        return _require_set(self.tasks).cancel(context, reason)


class ModelSteps:
    """Steps of the type `llm`: the step calls a model once, without tools and without a worker."""

    llm: LLM | None

    def definition(self) -> StepType:
        """Return the definition of the step type."""
        return StepType(
            type="llm",
            title="Ask a language model",
            schema=object_schema(
                {
                    "prompt": TEXT,
                    "model": {"type": "string", "minLength": 1, "maxLength": 200},
                    "system": TEXT,
                    "output_schema": {"type": "object"},
                    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 200_000},
                },
                "prompt",
            ),
            execute=self.execute,
        )

    async def execute(self, context: StepContext) -> StepResult:
        """Call the model, and return its reply as the output of the step."""
        if self.llm is None:
            raise StepFailure("plugin_disabled", "The plugin llm is not active.", retryable=False)
        if not context.caller.may("llm.use"):
            raise StepFailure(
                "forbidden", "The person who started the run lacks the permission to call models.", retryable=False
            )
        config = context.config
        messages = [{"role": "system", "content": config["system"]}] if "system" in config else []
        messages.append({"role": "user", "content": config["prompt"]})
        request: Json = {"model": config.get("model", "default"), "messages": messages}
        if "max_tokens" in config:
            request["max_tokens"] = config["max_tokens"]
        schema = config.get("output_schema")
        if schema is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "output", "schema": schema, "strict": True},
            }
        try:
            response = await self.llm.complete(
                request, by=context.caller, run_id=context.run_id, max_cost_usd=context.remaining_usd
            )
        except BudgetRefused as refused:
            if refused.scope != "task":
                raise
            message = "The call might exceed the remaining cost limit of the run."
            raise StepFailure("budget_exceeded", message, kind="budget", retryable=False) from None
        text = response["choices"][0]["message"].get("content") or ""
        cost = float((response.get("corral") or {}).get("cost_usd") or 0)
        return StepResult(output=_structured(text, schema), cost_usd=cost)


def _structured(text: str, schema: Json | None) -> Any:
    """Return the output of a model: the parsed JSON if there is a schema, otherwise an object with the text.

    Raise `StepFailure` if the text is not JSON or does not match the schema.
    """
    if schema is None:
        return {"text": text}
    try:
        found = json.loads(text)
    except ValueError:
        raise StepFailure("invalid_output", "The model did not return JSON.") from None
    if faults := json_schema_errors(schema, found):
        raise StepFailure("invalid_output", f"The output does not match the schema: {faults[0].detail}")
    return found


class HttpSteps:
    """Steps of the type `http`: the step sends a request unless the egress guard or a circuit breaker refuses it."""

    egress: Egress | None
    breakers: Breakers | None

    def __init__(self) -> None:
        self._client: httpx2.AsyncClient | None = None

    def declare_breakers(self) -> None:
        """Declare the circuit breakers that guard requests to hosts."""
        if self.breakers is not None:
            self.breakers.declare("http")

    async def close(self) -> None:
        """Close the HTTP client and all of its connections."""
        if self._client is not None:
            await self._client.aclose()

    def definition(self) -> StepType:
        """Return the definition of the step type."""
        return StepType(
            type="http",
            title="Send an HTTP request",
            schema=object_schema(
                {
                    "method": {"enum": list(HTTP_METHODS)},
                    "url": {"type": "string", "minLength": 1, "maxLength": 8192},
                    "headers": {
                        "type": "object",
                        "additionalProperties": {"type": "string", "maxLength": 4096},
                        "maxProperties": 50,
                    },
                    "body": {},
                    "expect_status": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 100, "maximum": 599},
                        "minItems": 1,
                        "maxItems": 50,
                    },
                    "timeout_seconds": {"type": "integer", "minimum": 1, "maximum": MAX_HTTP_SECONDS},
                },
                "method",
                "url",
            ),
            output_schema=object_schema({"status": {"type": "integer"}, "headers": {"type": "object"}, "body": {}}),
            execute=self.execute,
            check=_check_headers,
            secrets=True,
        )

    async def execute(self, context: StepContext) -> StepResult:
        """Send the request. All attempts send the same `Idempotency-Key`."""
        import httpx2

        from corral.egress.transport import is_truncated

        config = context.config
        host = (urlsplit(config["url"]).hostname or "").lower()
        if context.with_secrets is not None:
            config = await context.with_secrets(host)
            if (urlsplit(config["url"]).hostname or "").lower() != host:  # the secrets were released for this host only
                message = "The host of the URL must depend neither on a secret nor on the time."
                raise StepFailure("invalid_request", message, retryable=False)
        headers = {name.lower(): value for name, value in (config.get("headers") or {}).items()}
        content = _encoded_body(config.get("body"), headers)
        headers.setdefault("idempotency-key", context.idempotency_key)
        seconds = config.get("timeout_seconds", HTTP_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                response = await self._send(host, config["method"], config["url"], headers, content)
        except EgressBlocked as blocked:
            raise StepFailure(blocked.code, blocked.reason, retryable=False) from None
        except (TimeoutError, httpx2.TimeoutException):
            message = f"There was no complete response within {seconds} seconds."
            raise StepFailure("timeout", message, kind="timeout") from None
        except (httpx2.InvalidURL, ValueError) as failure:
            raise StepFailure("invalid_request", f"The request is not valid: {failure}.", retryable=False) from None
        except httpx2.ConnectError as failure:
            raise StepFailure("connection_failed", f"The connection failed: {failure}.") from None
        except httpx2.HTTPError as failure:
            message = f"The connection broke, or the server sent no valid HTTP response ({type(failure).__name__})."
            raise StepFailure("connection_failed", message) from None
        if is_truncated(response):
            raise StepFailure("response_too_large", "The response is larger than 1 MiB.", retryable=False)
        expected = config.get("expect_status")
        is_expected = response.status_code in expected if expected else 200 <= response.status_code < 300
        if not is_expected:
            is_temporary = response.status_code >= 500 or response.status_code == 429
            message = f"The service answered with the status {response.status_code}."
            raise StepFailure(f"http_{response.status_code}", message, retryable=is_temporary)
        body = await asyncio.to_thread(_decoded_body, response)
        output = {"status": response.status_code, "headers": dict(response.headers), "body": body}
        return StepResult(output=output, tainted=True)

    async def _send(
        self, host: str, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> httpx2.Response:
        async def send() -> httpx2.Response:
            return await self._open_client().request(method, url, headers=dict(headers), content=content)

        return await send() if self.breakers is None else await self.breakers.guard(f"http:{host}", send, judge=_judge)

    def _open_client(self) -> httpx2.AsyncClient:
        if self._client is None:
            assert self.egress is not None
            self._client = self.egress.client("http_step", total_seconds=float(MAX_HTTP_SECONDS), max_bytes=MIB)
        return self._client


def _judge(outcome: Any) -> Verdict:
    """Classify a request for its host's circuit breaker. Requests that the egress guard refuses are not counted."""
    if isinstance(outcome, EgressBlocked | ValueError):
        return "neutral"
    status = getattr(outcome, "status_code", None)
    return "failure" if status is None else judge_status(status)


def _check_headers(config: Json) -> list[FieldError]:
    headers = config.get("headers")
    names = [name for name in headers if name.lower() in RESERVED_HEADERS] if isinstance(headers, dict) else []
    return [FieldError(f"/headers/{name}", "not_allowed", "Corral sets this header itself.") for name in names]


def _encoded_body(body: Any, headers: dict[str, str]) -> bytes | None:
    """Return the bytes of a request body, or None if there is no body. A body that is not text is sent as JSON.

    The default content type is added to `headers`.
    """
    if body is None:
        return None
    if isinstance(body, str):
        headers.setdefault("content-type", "text/plain; charset=utf-8")
        return body.encode()
    headers.setdefault("content-type", "application/json")
    return msgspec.json.encode(body)


def _decoded_body(response: httpx2.Response) -> Any:
    """Return the body of a response as parsed JSON, or as text if it is not JSON."""
    if "json" in response.headers.get("content-type", ""):
        try:
            return json.loads(response.content)
        except ValueError:
            pass
    return response.content.decode("utf-8", "replace").replace("\0", "\ufffd")


class InputSteps:
    """Steps of the type `input`: the step waits until a person submits data."""

    def definition(self) -> StepType:
        """Return the definition of the step type."""
        return StepType(
            type="input",
            title="Ask a person for data",
            schema=object_schema(
                {
                    "prompt": TEXT,
                    "schema": {"type": "object"},
                    "assignees": {"type": "array", "items": {"type": "string", "maxLength": 36}, "maxItems": 50},
                    "expires_in_seconds": {"type": "integer", "minimum": 1, "maximum": 2_592_000},
                },
                "prompt",
            ),
            dispatch=self.dispatch,
            waits=True,
        )

    def dispatch(self, context: StepContext) -> StepWait:
        """Make the step wait for a person.

        `waits_for` is the id of the step itself. No event ends this wait; only a person or a timer ends the step.
        """
        seconds = context.config.get("expires_in_seconds")
        until = clock.now(seconds) if seconds is not None else None
        return StepWait(waits_for=context.step_run_id, status="waiting", person=True, until=until)


class ChildSteps:
    """Steps of the type `workflow`: the step starts a run of another workflow."""

    workflows: Workflows | None

    def definition(self) -> StepType:
        """Return the definition of the step type."""
        return StepType(
            type="workflow",
            title="Run another workflow",
            schema=object_schema(
                {"workflow_id": {"type": "string", "maxLength": 36}, "input": {}, "wait": {"type": "boolean"}},
                "workflow_id",
            ),
            dispatch=self.dispatch,
            resolve=self.resolve,
            cancel=self.cancel,
        )

    def dispatch(self, context: StepContext) -> StepWait | StepResult:
        """Start a run of the other workflow with the rights of the person who started the run of this step."""
        request = RunRequest(
            workflow_id=context.config["workflow_id"].lower(),
            input=context.config.get("input", {}),
            trigger_type="workflow",
            trigger_id=context.workflow_id,
            tainted=context.tainted,
            cause_chain=context.cause_chain,
            parent_run_id=context.run_id,
            depth=context.depth + 1,
        )
        run = _require_set(self.workflows).start(request, by=context.caller)
        if context.config.get("wait", True):
            return StepWait(waits_for=run.id)
        return StepResult(output={"run_id": run.id})

    def resolve(self, context: StepContext, event: LoggedEvent) -> StepResult | None:
        """End the step if the run that it started has ended. The output of that run becomes the step's output.

        Return None if the run has not ended.
        """
        run = _require_set(self.workflows).find_run(event.object_id)
        if run is None or run.status not in ("completed", "failed", "cancelled"):
            return None
        if run.status == "completed":
            return StepResult(output=run.output, cost_usd=run.cost_usd, tainted=run.tainted)
        if run.status == "cancelled":
            return StepResult(status="cancelled", cost_usd=run.cost_usd)
        error = _error_of_child(run.error)
        return StepResult(status="failed", error=error, cost_usd=run.cost_usd, tainted=run.tainted)

    def cancel(self, context: StepContext, reason: str | None) -> bool:
        """Cancel the run that the step started."""
        assert context.waits_for is not None
        _require_set(self.workflows).cancel(context.waits_for, reason=reason)
        run = _require_set(self.workflows).find_run(context.waits_for)
        return run is None or run.status in ("completed", "failed", "cancelled")


def _error_of_child(error: Mapping[str, Any] | None) -> Json:
    found = error or {}
    message = f"The run failed: {found.get('message', '')}"
    return {"kind": found.get("kind", "error"), "type": found.get("type", "error"), "message": message}


class BuiltInSteps:
    """The built-in step types of this plugin. Their services are set after the kernel has booted."""

    def __init__(self) -> None:
        self.agent, self.model, self.http, self.child = AgentSteps(), ModelSteps(), HttpSteps(), ChildSteps()
        self.input, self.code = InputSteps(), CodeSteps()

    def services(self) -> list[Provide]:
        """Return the providers of the step types.

        The step types are provided as services, so that the kernel sets the services that the step types use.
        """
        return [
            Provide(AgentSteps, lambda: self.agent),
            Provide(ModelSteps, lambda: self.model),
            Provide(HttpSteps, lambda: self.http),
            Provide(ChildSteps, lambda: self.child),
            Provide(CodeSteps, lambda: self.code),
        ]

    def definitions(self) -> list[StepType]:
        """Return the definitions of the built-in step types."""
        return [each.definition() for each in (self.agent, self.model, self.http, self.input, self.child, self.code)]
