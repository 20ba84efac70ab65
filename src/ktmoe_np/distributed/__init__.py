"""Layers whose experts are spread over several processes."""
