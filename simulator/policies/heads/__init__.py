"""Allocators over KV heads, one published method a file."""
