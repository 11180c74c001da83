"""The hub, its viewers, and replay."""
