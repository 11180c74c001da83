"""The marketplace, where people install, upgrade, remove and create templates for agent teams."""
