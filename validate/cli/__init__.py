"""The verbs of ``sim`` that need a model, and its entry."""
