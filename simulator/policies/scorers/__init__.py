"""Scorers, one published method a file."""
