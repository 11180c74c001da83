"""Messages between agents, and between people and agents."""
