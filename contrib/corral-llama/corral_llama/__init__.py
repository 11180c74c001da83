"""Local models for Corral. A child process runs a GGUF file with llama.cpp."""
