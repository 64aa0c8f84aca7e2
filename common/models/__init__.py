"""Backbones (picture -> embedding), heads (embedding -> logits), and which of their parameters are shared."""
