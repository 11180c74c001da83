"""Metrics of the `files` plugin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import peewee

from corral.metrics.histogram import Histogram
from corral.plugin import Metric
from corral_plugins.files.models import Usage

OPERATIONS = ("put", "get", "delete")
OUTCOMES = ("stored", "replayed", "too_large", "quota_exceeded", "blocked_type", "secret", "unavailable", "failed")


class FileMetrics:
    """Counts uploads, and measures the duration of file store calls."""

    def __init__(self) -> None:
        self._uploads: Counter[str] = Counter()
        self._storage = Histogram()

    def count_upload(self, outcome: str) -> None:
        """Count a finished upload by its outcome."""
        self._uploads[outcome] += 1

    def observe_storage(self, op: str, seconds: float) -> None:
        """Record the duration of one file store call."""
        self._storage.observe(seconds, (op,))

    def definitions(self) -> list[Metric]:
        """Return the definitions of all file metrics."""
        return [
            Metric(name="corral_files_bytes", help="Size of all stored files, in bytes.", collect=stored_bytes),
            Metric(
                name="corral_file_uploads_total",
                help="Number of finished uploads by outcome.",
                kind="counter",
                labels={"outcome": OUTCOMES},
                collect=self._collect_uploads,
            ),
            Metric(
                name="corral_storage_seconds",
                help="Duration of calls to the file store by operation, in seconds.",
                kind="histogram",
                labels={"op": OPERATIONS},
                collect=self._storage.read,
            ),
        ]

    def _collect_uploads(self) -> Mapping[tuple[str, ...], float]:
        return {(outcome,): float(count) for outcome, count in self._uploads.items()}


def stored_bytes() -> Mapping[tuple[str, ...], float]:
    """Return the total size of all users' files in bytes."""
    return {(): float(Usage.select(peewee.fn.SUM(Usage.bytes)).scalar() or 0)}
