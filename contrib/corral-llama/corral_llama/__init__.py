"""Local models for Corral. A child process runs a GGUF model with llama.cpp."""
