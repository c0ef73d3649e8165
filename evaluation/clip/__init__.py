"""CLIP models on image classification: suites of tasks, heads from the text tower, image towers with those heads."""
