"""ggml, the kernels of llama.cpp."""
