"""Security: API keys, IP rules, rate limits, the sign-in policy."""
