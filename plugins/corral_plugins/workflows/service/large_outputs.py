"""Stores step outputs that are too large for a database row as files of the person who started the run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec

from corral.errors import Problem
from corral_plugins.files.api import Files, FileSource
from corral_plugins.workflows.api import StepFailure
from corral_plugins.workflows.models import Run
from corral_plugins.workflows.service.run_state import StepRow

OUTPUT_LIMIT = 256 * 1024
MARK = "$file"
"""The key that contains the file's id in a reference to a large output."""


def is_too_large(output: Any) -> bool:
    """Return whether an output is too large for a database row."""
    return len(msgspec.json.encode(output)) > OUTPUT_LIMIT


class LargeOutputs:
    """Stores large outputs as files. Its methods are called outside units of work."""

    files: Files | None

    async def store(self, run: Run, row: StepRow, output: Any) -> dict[str, Any]:
        """Store a large output of a step as a file, and return a reference to the file.

        Raise `StepFailure` if the run was not started by a person, who would own the file, or if the file cannot be
        stored.
        """
        owner = run.started_by
        if self.files is None or owner is None:
            raise StepFailure("output_too_large", "The output of the step is larger than 256 KiB.", retryable=False)
        source = FileSource(type="step", id=row.id)
        content, cause = _in_one_chunk(msgspec.json.encode(output)), tuple(run.cause)
        try:
            stored = await self.files.put(content, name=f"{row.name}.json", owner_id=owner, source=source, cause=cause)
        except Problem as problem:
            detail = (
                f"The output of the step is larger than 256 KiB and could not be stored as a file: {problem.detail}"
            )
            raise StepFailure("output_too_large", detail, retryable=problem.status >= 500) from problem
        return {MARK: stored.id, "size": stored.size_bytes}

    async def remove(self, outputs: Iterable[dict[str, Any]]) -> None:
        """Remove the files of outputs. Called if the changes to the steps were not written."""
        for output in outputs:
            if self.files is not None:
                await self.files.remove(output[MARK])


async def _in_one_chunk(content: bytes) -> AsyncIterator[bytes]:
    yield content
