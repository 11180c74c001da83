"""Circuit breakers: stop calling a system that fails, so that its failure costs seconds."""
