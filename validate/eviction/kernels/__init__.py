"""Triton kernels of eviction; see ``validate.eviction.device`` for the arrays they take."""
