"""Real models: record traces and confirm by real eviction. The only package that needs torch."""
