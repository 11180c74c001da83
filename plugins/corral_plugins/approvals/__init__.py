"""Approvals: people review consequential actions before they happen, and approve exactly the content to execute."""
