"""Image data sets into embedding caches."""
