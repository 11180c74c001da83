"""The microkernel, which combines plugins into one running application without depending on any of them."""
