"""The program that the child process executes. It serves a model with llama.cpp on the loopback interface.

The program reads one JSON object from standard input: `{import_path, model, context_tokens, threads, api_key}`. When
the model is loaded, it writes one JSON object to standard output: `{"address": "http://127.0.0.1:…"}`, or `{"error":
"…"}` if loading failed. If the parent exits for any reason, its end of the pipe to standard input closes, and the child
exits. The program imports only the standard library and xllamacpp.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

_servers: list[Any] = []  # a reference that keeps the server alive


def serve_model(options: dict[str, Any]) -> str:
    """Load the model, serve it from background threads, and return the server's address."""
    import xllamacpp  # type: ignore[import-untyped,unused-ignore]  # it has no types

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_ctx, params.n_parallel = options["context_tokens"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.n_threads_http, params.cache_ram_mib = 4, 128
    params.api_keys = [options["api_key"]]  # without a key, every user of this machine could call the server
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.use_jinja, params.ui, params.endpoint_slots = True, False, False
    params.verbosity = 0
    _servers.append(server := xllamacpp.Server(params))
    return str(server.listening_address)


def main() -> None:
    """Read the options, start the server, and wait until the parent exits."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the process group; the parent drains its calls first
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of the library off the pipe
    options = json.loads(sys.stdin.readline())
    sys.path[:] = options["import_path"]
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        message = {"address": serve_model(options)}
    except Exception as error:
        message = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(message), file=out, flush=True)
    if "error" in message:
        os._exit(1)
    threading.Event().wait()


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
