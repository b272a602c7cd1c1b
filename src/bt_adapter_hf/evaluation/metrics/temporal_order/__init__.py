"""A module of the library `evaluate`."""
