"""Triggers, which start work at a set time, on an event, on an external call, or when an expected event is missing."""
