"""Evaluation of models that read an image and a text: what they write, scored example by example."""
