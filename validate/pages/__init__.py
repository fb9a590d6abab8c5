"""Pages whose tables are made from stored results."""
