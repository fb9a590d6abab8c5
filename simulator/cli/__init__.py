"""The verbs of ``sim`` that need no model."""
