"""The modalities of classifiers that have a head for each task: of images, and of texts."""
