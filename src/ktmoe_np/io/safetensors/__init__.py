"""Safetensors: headers, files, checkpoints of several files, writing."""
