"""Least squares behind a compressed prefix."""
