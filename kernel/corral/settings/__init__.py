"""Run-time settings: their declarations, their effective values, and the protocol for changing them."""
