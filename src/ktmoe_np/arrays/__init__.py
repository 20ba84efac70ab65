"""Arrays of any library: what they are, where they lie, and checks that name what is wrong."""
