"""Circuit breakers: stop calls to a failing system, so that callers do not wait for it again and again."""
