"""ktmoe_np itself."""
