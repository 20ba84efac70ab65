"""Passes of a layer: batches, tasks, what is pending, deferred experts, CUDA streams."""
