"""Experts that a GPU computes: which ones, and their arrays."""
