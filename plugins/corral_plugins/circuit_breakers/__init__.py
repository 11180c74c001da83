"""Circuit breakers, which stop calls to failing systems so that callers do not repeatedly wait for them."""
