"""Models: loading, shapes, attention hooks, the next token."""
