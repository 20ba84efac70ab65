"""NumPy alone."""
