"""Marketplace: people install, upgrade and remove templates of agent teams, and create their own templates."""
