"""Approvals: people review consequential actions before they happen, and approve the exact content to execute."""
