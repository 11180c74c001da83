"""Business logic of the LLM gateway."""
