"""Layers of experts by how their weights are held, common to inference and training."""
