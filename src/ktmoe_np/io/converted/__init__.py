"""Directories of converted layers: a file per layer, and the manifest."""
