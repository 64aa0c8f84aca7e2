"""The model in use: whether two photographs show one person, who is on one, and the gallery of those who are known."""
