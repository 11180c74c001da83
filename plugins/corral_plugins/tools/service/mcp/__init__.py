"""MCP servers: their registration, the pinned definitions of their tools, and the calls to them."""
