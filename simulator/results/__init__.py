"""Tables of results: what they hold, how they are stored, compared and shown."""
