"""The listening socket, which all processes of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import select
import socket
import struct
import sys
import time
import urllib.parse
from collections.abc import Callable

from corral.errors import StartupError

BACKLOG = 1024
UNREAD_SECONDS = 60  # a peer that reads nothing for this long is considered gone
PENDING_SECONDS = 3.0  # time to accept the connections that are pending when the server stops
CLOSED_SECONDS = 0.1  # time in which every process stops accepting
SO_ATTACH_FILTER = 26  # Linux; Python does not define it
DROP_ALL = struct.pack("HBBI", 6, 0, 0, 0)  # a packet filter of one instruction: return 0 bytes of the packet


def listen(bind: str) -> socket.socket:
    """Return a listening socket.

    Raise `StartupError` if the address is in use or does not belong to this machine.
    """
    split = urllib.parse.urlsplit(f"//{bind}")
    host, port = split.hostname or "127.0.0.1", split.port or 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # accepted connections inherit this option
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartupError(f"server.bind: cannot listen on {bind}: {error.strerror}; choose another address") from None
    listener.listen(BACKLOG)
    return listener


def listener_url(listener: socket.socket, *, tls: bool) -> str:
    """Return the URL of the address that the socket is bound to, which may be a wildcard address."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def loopback_url(url: str) -> str:
    """Return the URL that a process on this machine uses to connect to the listener with the given URL."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


async def refuse_connections(listener: socket.socket, stop_accepting: Callable[[], None]) -> None:
    """Refuse new connections in all processes that share the listener, without resetting a pending connection.

    `stop_accepting` makes all these processes stop accepting connections. It is called after the pending connections
    have been accepted.
    """
    _ignore_new_connections(listener)
    pending = select.poll()
    pending.register(listener, select.POLLIN)
    until = time.monotonic() + PENDING_SECONDS
    while pending.poll(0) and time.monotonic() < until:  # noqa: ASYNC110  # no event tells
        await asyncio.sleep(0.01)
    stop_accepting()
    await asyncio.sleep(CLOSED_SECONDS)
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # clients that try again are refused at once


def _ignore_new_connections(listener: socket.socket) -> None:
    """Make the operating system ignore new connections. Pending connections can still be accepted.

    Clients that try to connect now will retry. On Linux, a packet filter drops the packets of new connections. On other
    systems, one connection at a time may still be accepted.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(DROP_ALL)
        filter_of_packets = struct.pack("HL", 1, ctypes.addressof(program))
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter_of_packets)
    else:
        listener.listen(0)
