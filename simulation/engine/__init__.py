"""The simulation's engine: Flower's, inside of it, on Ray (docs/adr/0022-flowers-inside.md)."""
