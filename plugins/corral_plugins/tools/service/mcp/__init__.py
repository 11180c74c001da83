"""MCP servers: their registration, the accepted definitions of their tools, and the calls of these tools."""
