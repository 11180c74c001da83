"""`/ws` and SSE."""
