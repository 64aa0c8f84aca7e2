"""The peers, each written as its own users write it."""
