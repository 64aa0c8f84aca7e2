"""Closed-set and open-set scores from counts and histograms that merge."""
