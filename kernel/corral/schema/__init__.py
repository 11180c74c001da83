"""Shapes: bytes to JSON, JSON to types, types to JSON Schema."""
