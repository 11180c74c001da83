"""Run-time settings: their declarations, their effective values, and a protocol for changing them."""
