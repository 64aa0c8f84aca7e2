"""What this side uses of Flower's inside, and what it starts of it (docs/adr/0022-flowers-inside.md)."""
