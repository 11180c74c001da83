"""Data validation: strict JSON parsing, conversion to types, and JSON Schema."""
