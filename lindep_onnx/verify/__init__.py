"""The result against the original."""
