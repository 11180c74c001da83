"""The business logic of API keys, IP rules, rate limits and policies."""
