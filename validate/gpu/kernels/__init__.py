"""Triton kernels of eviction; see ``validate.gpu`` for the arrays they take."""
