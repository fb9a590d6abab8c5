"""Decoding under a KV budget: evicted entries are gone, and their memory is free."""
