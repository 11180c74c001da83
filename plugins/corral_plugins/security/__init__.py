"""Security: API keys, IP rules, rate limits and the sign-in policy."""
