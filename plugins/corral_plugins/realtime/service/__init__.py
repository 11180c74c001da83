"""The hub and its viewers, what they may see, replay, and the two ways out: sockets and streams."""
