"""Training without a federation: local, centralised, and studies on twins."""
