"""Live events over WebSocket and SSE."""
