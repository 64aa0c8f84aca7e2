"""Differential privacy: what a release costs, and how it is made noisy."""
