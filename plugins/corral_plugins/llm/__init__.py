"""The LLM gateway: the single path for all calls to language models."""
