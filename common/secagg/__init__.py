"""Secure aggregation: keys, shares and masks, so that whoever adds sees the sum and no summand."""
