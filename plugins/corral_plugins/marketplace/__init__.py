"""The marketplace, where people install, upgrade, remove and create templates of agent teams."""
