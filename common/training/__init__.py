"""Training and evaluation of a model on one pack, the same in every mode."""
