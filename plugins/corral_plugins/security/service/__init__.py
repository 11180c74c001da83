"""The business logic for API keys, IP rules, rate limits and policies."""
