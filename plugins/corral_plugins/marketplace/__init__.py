"""Marketplace: templates of working teams, which people install, upgrade, remove, and make of their own work."""
