"""The interface through which the parts of `corral demo` report their progress and their failures."""

from __future__ import annotations

from typing import Protocol


class DemoFailed(Exception):
    """Raised when the demo cannot continue. The message states the reason."""


class ProgressPrinter(Protocol):
    """Receives the progress of the demo for display."""

    def step(self, name: str, text: str) -> None:
        """Report one step of the demo, for example `("task", "Summarise the notes")`."""
        ...

    def print_model_text(self, text: str, *, goes_on: bool) -> None:
        """Report text streamed from the model.

        `goes_on` is true if the text continues the previous text.
        """
        ...
