"""What eviction does to pretrained models: texts, stored results, their tables and charts."""
