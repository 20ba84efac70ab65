"""Benches of ktmoe_np and of its peers; see README.md beside this file."""
