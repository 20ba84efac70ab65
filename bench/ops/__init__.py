"""The benches: one module for each thing that is timed."""
