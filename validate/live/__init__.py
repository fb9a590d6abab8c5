"""Accuracy under real eviction: policies x budgets over problems with known answers."""
