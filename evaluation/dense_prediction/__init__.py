"""Models that predict something of every pixel, or a picture: data, scores, and how they are opened."""
