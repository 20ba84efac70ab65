"""Arrays from any library: their kind and device, and checks with errors that name the argument."""
