"""What is wrong with a family of experts, found in its weights alone, and what to do about it: a file a subject."""
