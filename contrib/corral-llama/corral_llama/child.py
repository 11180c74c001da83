"""The program of the child process: llama.cpp's server on loopback, until standard input closes.

One JSON object comes on standard input: `{import_path, model, context_tokens, threads, api_key}`. One goes out on
standard output: `{"address": "http://127.0.0.1:…"}` once the model is loaded, or `{"error": "…"}`. It ends with its
parent, however that ends: then the pipe closes. It needs nothing but the standard library and xllamacpp.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any


def serve(given: dict[str, Any]) -> str:
    """Load the model and serve it from threads of its own; the address."""
    import xllamacpp  # type: ignore[import-untyped,unused-ignore]  # it has no types

    params = xllamacpp.CommonParams()
    params.model.path = given["model"]
    params.n_ctx, params.n_parallel = given["context_tokens"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    params.n_threads_http, params.cache_ram_mib = 4, 128
    params.api_keys = [given["api_key"]]  # without one the port is open to everybody on this machine
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.use_jinja, params.ui, params.endpoint_slots = True, False, False
    params.verbosity = 0
    kept.append(server := xllamacpp.Server(params))
    return str(server.listening_address)


kept: list[Any] = []


def main() -> None:
    """Read, serve, wait."""
    for number in (signal.SIGINT, signal.SIGTERM):  # of the parent's group; the parent drains first, then closes
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no message
    given = json.loads(sys.stdin.readline())
    sys.path[:] = given["import_path"]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = {"address": serve(given)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=out, flush=True)
    if "error" in answer:
        os._exit(1)
    threading.Event().wait()


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
