"""Triggers, which start work at a set time, on an event, on a webhook request, or when an expected event is missing."""
