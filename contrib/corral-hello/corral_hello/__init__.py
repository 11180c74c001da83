"""The smallest complete plugin of Corral."""
