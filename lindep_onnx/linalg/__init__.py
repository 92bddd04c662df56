"""Linear algebra on NumPy and SciPy alone."""
