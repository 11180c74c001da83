"""Turns plugins into one running application: discovery, loading, wiring, and isolation of what fails."""
