"""Charts of stored tables."""
