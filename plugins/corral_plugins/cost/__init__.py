"""Cost accounting: cost events, prices, and totals that are accurate to one micro-dollar."""
