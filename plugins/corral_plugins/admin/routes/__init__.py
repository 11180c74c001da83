"""The HTTP routes of the `admin` plugin."""
