"""What is known of a federation: its history, what is told of it as it happens, and its checkpoints."""
