"""The microkernel: turns plugins into one running application and knows none of them."""
