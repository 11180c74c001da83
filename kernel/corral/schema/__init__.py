"""Validation of data: strict JSON parsing, conversion to types, and JSON Schema."""
