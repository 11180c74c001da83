"""CEL expressions and templates for user-written configuration."""
