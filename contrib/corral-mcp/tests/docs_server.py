"""An MCP server for the tests, written with the SDK: `python docs_server.py http PORT FILE` or `… stdio FILE`.

The file contains the description of the tool `search`. A changed file changes the tool.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mcp.server.mcpserver import MCPServer


def make_server(description: str) -> MCPServer:
    """A server with the tools `search`, `readPage` and `fail`."""
    server = MCPServer("docs")

    def search(text: str) -> str:
        return f"found {text}"

    server.add_tool(search, description=description)

    @server.tool(name="readPage")
    def read_page(number: int) -> dict[str, int]:
        """Reads a page."""
        return {"page": number}

    @server.tool()
    def fail(text: str) -> str:
        """Fails."""
        raise ValueError(f"no {text}")

    return server


if __name__ == "__main__":
    made = make_server(Path(sys.argv[-1]).read_text("utf-8"))
    if sys.argv[1] == "stdio":
        made.run("stdio")
    else:
        made.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
