"""Marketplace: people install, upgrade and remove templates of working teams, and create their own templates."""
