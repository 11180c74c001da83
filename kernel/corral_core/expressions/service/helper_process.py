"""The helper process, which evaluates expressions that may take a long time or need much memory.

It reads requests from stdin and writes responses to stdout. A 4-byte length precedes each message. If an evaluation
takes too long, the operating system ends the process, and the server process starts a new one.
"""

from __future__ import annotations

import resource
import signal
import sys
from typing import Any, BinaryIO

import msgspec

from corral_core.expressions.service.cel import EvaluationError, evaluate

EVALUATION_SECONDS = 1.0
MEMORY_BYTES = 256 * 1024 * 1024


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole process group
    while len(head := requests.read(4)) == 4:
        body = requests.read(int.from_bytes(head, "big"))
        signal.setitimer(signal.ITIMER_REAL, EVALUATION_SECONDS)
        answer = msgspec.json.encode(_answer(msgspec.json.decode(body)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(len(answer).to_bytes(4, "big") + answer)
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": evaluate(request["expression"], request["data"], request["now"])}
    except EvaluationError as error:
        return {"offset": error.offset, "message": error.message}


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
