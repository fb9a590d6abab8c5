"""Problems: prompts, families of generated ones, and grading."""
