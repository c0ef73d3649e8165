"""Plans, and how they are carried out: streaming, exactly, resumably."""
