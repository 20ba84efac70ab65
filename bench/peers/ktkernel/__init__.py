"""kt-kernel, by its extension module."""
