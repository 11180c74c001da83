"""Model Context Protocol support for Corral, based on the official SDK."""
