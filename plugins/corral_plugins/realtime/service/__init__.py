"""The event hub and its viewers: permissions, replay, and delivery over WebSocket and server-sent events."""
