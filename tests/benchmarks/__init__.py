"""What Corral must reach, measured: `python -m tests.benchmarks [NAME…] [--short]`."""
