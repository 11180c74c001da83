"""What this machine is and how busy it is; figures that the system does not give are left out."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
from importlib import metadata
from typing import Any


def facts() -> dict[str, Any]:
    """For registering."""
    known: dict[str, Any] = {
        "hostname": socket.gethostname()[:255],
        "cpu_cores": os.cpu_count(),
        "memory_total_mb": _memory().get("MemTotal", 0) // 1024 or None,
        "os_info": f"{platform.system()} {platform.release()} {platform.machine()}",
        "agent_version": _version(),
    }
    return {key: value for key, value in known.items() if value is not None}


def usage(folder: str) -> dict[str, float]:
    """For heartbeats: percents of processor (load over cores), memory, and the disk that holds `folder`."""
    figures: dict[str, float] = {"cpu_usage_percent": 100 * os.getloadavg()[0] / (os.cpu_count() or 1)}
    memory = _memory()
    if memory.get("MemTotal") and "MemAvailable" in memory:
        figures["memory_usage_percent"] = 100 * (1 - memory["MemAvailable"] / memory["MemTotal"])
    with contextlib.suppress(OSError, ZeroDivisionError):
        disk = shutil.disk_usage(folder)
        figures["disk_usage_percent"] = 100 * disk.used / disk.total
    return {name: round(min(100.0, max(0.0, value)), 1) for name, value in figures.items()}


def _memory() -> dict[str, int]:
    """KiB by name."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            pairs = (line.split(":") for line in file)
            return {name: int(rest.split()[0]) for name, rest in pairs}
    except (OSError, ValueError, IndexError):
        return {}


def _version() -> str | None:
    try:
        return f"corral {metadata.version('corral')}"
    except metadata.PackageNotFoundError:
        return None
