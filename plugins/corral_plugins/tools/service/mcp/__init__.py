"""MCP servers: their registration, the accepted definitions of their tools, and calls to these tools."""
