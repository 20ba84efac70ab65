"""GGUF: headers, files, values, and the experts in them."""
