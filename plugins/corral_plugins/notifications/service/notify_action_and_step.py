"""The trigger action and the workflow step that send notifications."""

from __future__ import annotations

from corral.auth.principal import Principal
from corral.errors import Problem, Unavailable
from corral_plugins.notifications.api import Json
from corral_plugins.notifications.service.direct_notifications import ID, SCHEMA, SEND, DirectNotifications
from corral_plugins.triggers.api import FireContext, TriggerAction
from corral_plugins.workflows.api import StepContext, StepFailure, StepResult, StepType

NAME = "notify"


class NotifyActionAndStep:
    """The trigger action and the workflow step `notify`.

    The plugin connects them to the service with `set_implementation`.
    """

    def __init__(self) -> None:
        self._direct: DirectNotifications | None = None

    def set_implementation(self, direct: DirectNotifications) -> None:
        """Connect the action and the step to their service."""
        self._direct = direct

    def action(self) -> TriggerAction:
        """Return the definition of the trigger action."""
        return TriggerAction(
            type=NAME,
            title="Send a notification",
            schema=SCHEMA,
            example={"title": "News", "body": "{{ payload.title }}", "severity": "warning"},
            permission=SEND,
            run=self._run_action,
            check=self._check_action,
        )

    def step(self) -> StepType:
        """Return the definition of the workflow step."""
        output = {"type": "object", "properties": {"id": ID}, "required": ["id"], "additionalProperties": False}
        return StepType(
            type=NAME, title="Send a notification", schema=SCHEMA, output_schema=output, dispatch=self._run_step
        )

    def _run_action(self, context: FireContext, fields: Json) -> Json:
        """Send a notification with the permissions of the trigger's owner."""
        about = ("trigger", context.trigger_id)
        return {
            "notification_id": self._require_services().send(fields, by=context.owner, object=about, pointer="/action")
        }

    def _check_action(self, caller: Principal, fields: Json) -> None:
        self._require_services().check(fields, by=caller)

    def _run_step(self, context: StepContext) -> StepResult:
        """Send a notification in the transaction that starts the step, so that it is sent exactly once."""
        about = ("workflow_run", context.run_id)
        try:
            sent = self._require_services().send(context.config, by=context.caller, object=about)
        except Problem as problem:
            raise StepFailure(problem.code, problem.detail, retryable=False) from None
        return StepResult(output={"id": sent})

    def _require_services(self) -> DirectNotifications:
        if self._direct is None:
            raise Unavailable("The server is starting; try again.")
        return self._direct
