"""Real eviction on the tokens of a trace, beside its replay."""
