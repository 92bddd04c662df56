"""Which channels belong together, and how to cut them out."""
