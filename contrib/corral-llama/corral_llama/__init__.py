"""Local models for Corral: runs a GGUF file with llama.cpp in a child process."""
