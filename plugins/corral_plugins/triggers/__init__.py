"""Triggers: start work at a time, on an event, on a call from outside, or when something expected does not happen."""
