"""Merging that looks at examples: models that can be run, what is seen in them, and what is fitted to it."""
