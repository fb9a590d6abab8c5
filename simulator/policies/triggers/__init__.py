"""Triggers: when a layer compresses, one rule a file."""
