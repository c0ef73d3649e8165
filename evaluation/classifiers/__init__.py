"""Classifiers with a head for each task: of transformers, timm and torchvision."""
