"""Runs llama.cpp's own server, as a user would run it next to Corral: `own_server.py MODEL TEMPLATE KEY`.

The program prints the address of the server, and exits when standard input closes. TEMPLATE is a chat template that
supports tools, because the demo model's own template does not, and llama.cpp then offers no tools to the model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import xllamacpp  # type: ignore[import-untyped,unused-ignore]  # it has no types


def main(model: str, template: str, key: str) -> None:
    """Serve the model on the loopback interface until standard input closes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of the library off the pipe
    params = xllamacpp.CommonParams()
    params.model.path, params.api_keys = model, [key]
    params.n_ctx, params.n_parallel, params.verbosity = 4096, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # more of them would spin on busy cores
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.use_jinja, params.chat_template, params.ui = True, Path(template).read_text(), False
    server = xllamacpp.Server(params)
    print(server.listening_address, file=out, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
