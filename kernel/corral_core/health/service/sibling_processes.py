"""Exchanges metrics between sibling processes, which are the processes that serve the same address.

Each process returns the combined metrics of all siblings, so Prometheus can scrape any one of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from corral.plugin import InstallationConfig

log = logging.getLogger("corral.health")

ANSWER_SECONDS = 1.0  # if a process is missing, the sums decrease, which Prometheus takes for a restart
PATH_LIMIT = 100  # bytes of the path of a Unix socket
EARLIEST = "process_start_time_seconds"

Text = Callable[[], Awaitable[str]]


class SiblingProcesses:
    """Serves this process's metrics to its sibling processes, and reads their metrics.

    Each process listens on a Unix socket. All siblings create their sockets in the same folder, which is in the data
    folder unless the path would be too long.
    """

    def __init__(self, installation: InstallationConfig) -> None:
        self._data_dir = installation.data_dir
        self._own: Path | None = None
        self._server: asyncio.Server | None = None

    async def serve_metrics(self, address: str, text: Text) -> None:
        """Start serving this process's metrics to its sibling processes. `text()` returns the metrics.

        If the socket cannot be created, this process logs a warning and does not exchange metrics.
        """
        try:
            folder = self._socket_folder(address)
            own = folder / f"{os.getpid()}.sock"
            own.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(lambda _, writer: _send_text(writer, text), own)
        except OSError as error:
            log.warning("metrics of sibling processes are not included", extra={"reason": str(error)})
        else:
            self._own = own

    async def stop_serving(self) -> None:
        """Close the socket. The last process to stop also removes the folder."""
        if self._server is not None and self._own is not None:
            self._server.close()
            self._own.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._own.parent.rmdir()

    async def read_siblings(self) -> list[str]:
        """Return the metrics of the sibling processes. Siblings that do not respond within a second are omitted."""
        if self._own is None:
            return []
        others = [path for path in self._own.parent.glob("*.sock") if path != self._own]
        told = await asyncio.gather(*[_read_sibling(path) for path in others])
        return [text for text in told if text]

    def _socket_folder(self, address: str) -> Path:
        port = address.rpartition(":")[2]
        identity = hashlib.sha256(os.fsencode(self._data_dir)).hexdigest()[:12]
        outside = f"corral-{os.getuid()}-{identity}-{port}"
        bases = (Path(tempfile.gettempdir()), Path("/tmp"))  # noqa: S108 - the folder's owner is checked
        places = (self._data_dir / "run" / port, *[base / outside for base in bases])
        folder = next((place for place in places if _is_path_short_enough(place)), places[0])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{folder} is not a folder that belongs to the server's user")
        return folder


def _is_path_short_enough(folder: Path) -> bool:
    """Return whether the path of a socket in this folder has at most `PATH_LIMIT` bytes."""
    return len(os.fsencode(folder)) + len("/4194304.sock") <= PATH_LIMIT


async def _send_text(writer: asyncio.StreamWriter, text: Text) -> None:
    with contextlib.suppress(OSError):
        writer.write((await text()).encode())
        await writer.drain()
    writer.close()


async def _read_sibling(path: Path) -> str:
    """Read the metrics of a sibling process, or return an empty string on failure.

    If the process was killed, remove its socket.
    """
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                return (await reader.read()).decode()
            finally:
                writer.close()
    except ConnectionRefusedError:
        _remove_socket(path)
    except (OSError, TimeoutError):
        log.debug("a sibling process did not respond in time", extra={"socket": path.name})
    return ""


def _remove_socket(path: Path) -> None:
    path.unlink(missing_ok=True)


def sum_metrics(texts: list[str]) -> str:
    """Merge metrics in Prometheus text.

    The values of each series are summed. Of the start times of the processes, the earliest is kept.
    """
    if len(texts) == 1:
        return texts[0]
    families: dict[str, dict[str, float | None]] = {}  # the value of a comment line is None
    for text in texts:
        family: dict[str, float | None] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                if line.startswith("# HELP"):
                    family = families.setdefault(line.split(" ", 3)[2], {})
                family.setdefault(line, None)
                continue
            series, _, value = line.rpartition(" ")
            before = family.get(series)
            number = float(value)
            earliest = before is not None and series == EARLIEST
            family[series] = min(before or 0.0, number) if earliest else (before or 0.0) + number
    lines = [
        line if value is None else f"{line} {_format_number(value)}"
        for family in families.values()
        for line, value in family.items()
    ]
    return "\n".join(lines) + "\n"


def _format_number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
