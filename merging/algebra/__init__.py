"""What methods are composed of: the slots that they see, and pure functions on stacked tensors."""
