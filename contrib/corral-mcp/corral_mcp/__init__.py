"""The Model Context Protocol for Corral, on the official SDK."""
