"""How fast a replay is, and how fast it could be."""
