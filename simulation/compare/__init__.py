"""The comparison of trained models on the same test people."""
