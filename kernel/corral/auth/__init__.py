"""Authentication of callers, their permissions, and the visibility of objects and events."""
