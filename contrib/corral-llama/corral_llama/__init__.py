"""A model on this machine for Corral: a GGUF file through llama.cpp, in a process of its own."""
