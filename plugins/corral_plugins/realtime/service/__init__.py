"""The event hub and its connected viewers: permissions, replay, and delivery over WebSocket and server-sent events."""
