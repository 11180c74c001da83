"""Data about this machine and its resource usage. Values that the operating system does not provide are omitted."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
from importlib import metadata
from typing import Any


def host_facts() -> dict[str, Any]:
    """Return the data about this machine that the worker sends at registration."""
    found: dict[str, Any] = {
        "hostname": socket.gethostname()[:255],
        "cpu_cores": os.cpu_count(),
        "memory_total_mb": _read_meminfo().get("MemTotal", 0) // 1024 or None,
        "os_info": f"{platform.system()} {platform.release()} {platform.machine()}",
        "agent_version": _worker_version(),
    }
    return {name: value for name, value in found.items() if value is not None}


def host_usage(folder: str) -> dict[str, float]:
    """Return the current resource usage of this machine in percent, for heartbeats.

    The values are the processor usage (load average divided by the number of cores), the memory usage, and the usage of
    the disk that contains `folder`.
    """
    percents: dict[str, float] = {"cpu_usage_percent": 100 * os.getloadavg()[0] / (os.cpu_count() or 1)}
    memory = _read_meminfo()
    if memory.get("MemTotal") and "MemAvailable" in memory:
        percents["memory_usage_percent"] = 100 * (1 - memory["MemAvailable"] / memory["MemTotal"])
    with contextlib.suppress(OSError, ZeroDivisionError):
        disk = shutil.disk_usage(folder)
        percents["disk_usage_percent"] = 100 * disk.used / disk.total
    return {name: round(min(100.0, max(0.0, value)), 1) for name, value in percents.items()}


def _read_meminfo() -> dict[str, int]:
    """Return the values in /proc/meminfo in KiB, or an empty dictionary if the file does not exist."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            pairs = (line.split(":") for line in file)
            return {name: int(rest.split()[0]) for name, rest in pairs}
    except (OSError, ValueError, IndexError):
        return {}


def _worker_version() -> str | None:
    try:
        return f"corral {metadata.version('corral')}"
    except metadata.PackageNotFoundError:
        return None
