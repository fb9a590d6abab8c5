"""Measure a GPU: kernels against its copy bandwidth, and decoding under a budget against the full cache."""
