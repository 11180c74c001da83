"""What an attempt knows of itself between two steps, and what its worker asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from corral_plugins.workers.node import messages as talk


class Wishes:
    """What the worker asks of a running attempt: `drain` (release at the next step) and `budget` (finish soon)."""

    def __init__(self) -> None:
        self._asked: set[str] = set()

    def add(self, wish: str) -> None:
        """Ask."""
        self._asked.add(wish)

    def __contains__(self, wish: str) -> bool:
        return wish in self._asked


class Function(msgspec.Struct):
    """What a call names."""

    name: str
    arguments: str


class Call(msgspec.Struct):
    """A tool call of the model."""

    id: str
    function: Function


class Said(msgspec.Struct):
    """A message, as far as the loop reads it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None
    tool_calls: list[Call] = []
    tool_call_id: str = ""


class Kept(msgspec.Struct):
    """A checkpoint of this loop; members that it does not know are another release's."""

    step: int = 0
    repairs: int = 0
    warned: bool = False
    running: str | None = None
    messages: list[Said] = []
    permits: dict[str, dict[str, Any]] = {}


class State:
    """What a checkpoint holds: the conversation, the last model step, repairs made, whether the budget was told, and
    `running`: the call of a tool on this machine that had begun. `permits` by call: what a person has approved.

    `fault`: why the checkpoint cannot be read; then there is nothing to go on from.
    """

    def __init__(self, claim: Mapping[str, Any]) -> None:
        resume = claim.get("resume") or {}
        kept = resume.get("checkpoint") or {}
        kept = kept.get("state", kept)
        self.fault = _fault(kept)
        if self.fault is not None:
            kept = {}
        self.step: int = kept.get("step", 0)
        self.repairs: int = kept.get("repairs", 0)
        self.warned: bool = kept.get("warned", False)
        self.running: str | None = kept.get("running")
        self.messages: list[talk.Message] = list(kept.get("messages") or talk.first(claim))
        self.permits: dict[str, Mapping[str, Any]] = dict(kept.get("permits") or {})
        for told in resume.get("tool_results") or ():
            if any(call["id"] == told.get("call_id") for call in talk.open_calls(self.messages)):
                if told.get("permit"):
                    self.permits[told["call_id"]] = told
                else:
                    self.messages.append(talk.tool_result(told["call_id"], talk.outcome(told)))
        if not talk.open_calls(self.messages):
            self.messages += talk.news(resume)

    def kept(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "step": self.step,
            "messages": self.messages,
            "open_calls": [call["id"] for call in talk.open_calls(self.messages)],
            "repairs": self.repairs,
            "warned": self.warned,
            "running": self.running,
            "permits": self.permits,
        }


def _fault(kept: Any) -> str | None:
    try:
        msgspec.convert(kept, Kept)
    except msgspec.ValidationError as error:
        return str(error)
    return None
