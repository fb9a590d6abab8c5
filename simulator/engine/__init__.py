"""The replay of one trace under one policy, and what it measures."""
