"""The reference reasoner: a small Llama that thinks step by step, its two task families and its training."""
