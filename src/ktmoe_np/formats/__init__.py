"""What weights are encoded as: methods, encodings of checkpoints, GGUF blocks, quantized formats."""
