"""What modalities share whose models write texts to the rows of tables."""
