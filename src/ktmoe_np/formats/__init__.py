"""Encodings of weights: methods, encodings of checkpoints, GGUF blocks, quantized formats."""
