"""`facefed data`: what a data set really holds, and people who do not exist."""
