"""Allocators over layers, one published method a file."""
