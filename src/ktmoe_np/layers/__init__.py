"""Layers of experts by kind of weights, common to inference and training."""
