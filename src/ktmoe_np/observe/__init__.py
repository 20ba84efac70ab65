"""What layers and the engine did: counts, times, timelines."""
