"""Figures drawn from merged sums, as matplotlib figures."""
