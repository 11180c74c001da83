"""What models cost: an event a call, prices, and sums that hold to the micro-dollar."""
