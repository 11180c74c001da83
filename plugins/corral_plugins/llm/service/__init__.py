"""The rules of the LLM gateway."""
