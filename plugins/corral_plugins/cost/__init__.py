"""Cost accounting: one event per use, prices, and totals that are exact to one micro-dollar."""
