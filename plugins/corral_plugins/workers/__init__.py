"""Workers: machines that ask for work, do it under a lease, and report."""
