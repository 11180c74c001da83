"""Cost accounting: cost events, prices, and totals that are exact to one micro-dollar."""
