"""The reference reasoner: a small Llama that thinks step by step; its tasks, training and measurements."""
